"""Effects: pages from templates: one HTML file with its style and script, in which all names are escaped.

A template extends `page.html`, and shows parts (`report.parts`) with the macros of `parts.html`.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def render(template: str | Template, **values: Any) -> str:
    """Return a page.

    Args:
        template: a file in `report/templates`, or a template of `environment`.
        values: what it shows; all texts are escaped.
    """
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is loaded, and no other script runs, even if a name could break out of its place.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assets = {"style": style, "script": script, "policy": policy}
    return environment().get_template(template).render(**assets, **values)


@cache
def environment() -> Environment:
    """Return the environment of all templates: texts are escaped, and a value that is missing is an error."""
    return Environment(
        loader=PackageLoader("imgbatch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _asset(name: str) -> str:
    return resources.files("imgbatch.report").joinpath("templates", name).read_text(encoding="utf-8")
