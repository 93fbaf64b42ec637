"""The documentation is held against the code: keys, codes, columns, flags and the map of the house."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from imgbatch import cli, config, errors, rejects, schema
from imgbatch.sources import split_words
from imgbatch.train.settings import Training

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(path.relative_to(ROOT) for folder in ("imgbatch", "jobs") for path in (ROOT / folder).rglob("*.py"))


def test_every_config_key_is_in_the_readme_with_its_default_and_help() -> None:
    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \| (.*) \|$", README, re.MULTILINE))
    for key, default, help in [*config.describe(), *config.describe(Training)]:
        if "." in key or key == "top_k":
            assert rows.get(key) == f"{f'`{default}`' if default else ''} | {help}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_module_is_on_the_map(path: Path) -> None:
    if path.name == "__init__.py":
        assert path.parent.name in ("imgbatch", "jobs") or f"`{path.parent}/`" in README
    else:
        assert f"`{path.name}`" in README or f"`{path}`" in README


def test_every_path_of_the_map_exists() -> None:
    for path in re.findall(r"^\| `([\w./]+)`", README[README.index("## The house") :], re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_every_column_and_reason_is_in_the_readme() -> None:
    tables = README[README.index("## What comes out") : README.index("## What is promised")]
    for name in {*schema.LABELS.names, *schema.REJECTS.names}:
        assert re.search(rf"\b{name}\b", tables), name
    for reason in set(rejects.REASONS) - {"duplicate"}:  # of containers, which are not read yet
        assert reason in README


def test_every_known_suffix_is_in_the_readme() -> None:
    known = re.search(r"Known are ([\w,\s]+)\.", README)
    assert known and set(re.findall(r"\w+", known[1])) == set(config.IMAGE_SUFFIXES)


def test_every_exit_code_is_in_readme_and_help() -> None:
    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and isinstance(getattr(kind, "exit_code", None), int)
    }
    for code in {0, *codes}:
        assert re.search(rf"^\| {code} \|", README, re.MULTILINE)
        assert re.search(rf"^  {code}  ", cli.EXIT_CODES, re.MULTILINE)
    assert "| 130, 143 |" in README and "  130, 143  " in cli.EXIT_CODES


@pytest.mark.parametrize(
    ("name", "own"), [("classify", {"--limit", "--dry-run"}), ("evaluate", {"--against", "--labels", "--split"})]
)
def test_the_command_line_is_frozen_since_new_knobs_go_into_the_config(name: str, own: set[str]) -> None:
    text = subprocess.run(
        [sys.executable, f"jobs/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    flags = set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE))
    assert flags == {"--config", "--set", "--quiet", "--version", "--input", "--output", "--model", *own}
    assert all(key in text for key, _, _ in config.describe() if "." in key)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "runs").glob("*.toml")), ids=lambda path: path.name)
def test_every_named_run_is_a_valid_config(path: Path) -> None:
    assert config.load(str(path)).input


def test_dependencies_are_pinned_by_plain_lines() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", line) for line in lines)
    pinned = {line.partition("==")[0].lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in ("demo", "test", "check") for name in project["optional-dependencies"][extra]),
        *(ROOT / "tests" / "clients" / "requirements.txt").read_text().split(),
    ]
    assert {re.match(r"[A-Za-z0-9-]+", name)[0].lower() for name in wanted} <= pinned  # type: ignore[index]


def test_the_sums_on_the_page_about_scaling_are_right() -> None:
    assert doctest.testfile(str(ROOT / "docs" / "scaling.md"), module_relative=False).failed == 0


@pytest.mark.parametrize("page", ["reliability.md", "security.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    tests: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests[path.name] = tests.get(path.name, "") + path.read_text()  # two folders may have one of a name
    named = re.findall(r"`(test_\w+\.py|…)(?:::(\w+))?`", (ROOT / "docs" / page).read_text())
    assert len(named) > 10
    file = ""
    for found, function in named:
        file = file if found == "…" else found
        assert file in tests and f"def {function}" in tests[file], f"{file}::{function}"


def test_the_page_about_labels_and_splits_names_what_there_is() -> None:
    page = (ROOT / "docs" / "labels-and-splits.md").read_text()
    keys = {key for key, _, _ in config.describe()}
    assert set(re.findall(r"`(source\.[a-z_]+)", page)) <= keys
    ours = {"labels", "label_column", "label_depth", "splits", "split_column", "uri_template"}
    assert {f"source.{name}" for name in ours} <= set(re.findall(r"source\.[a-z_]+", page))
    words = re.search(r"Split words are (.*?)\.", page, re.S)
    assert words is not None and set(re.findall(r"[a-z]+", words[1])) - {"and"} == set(split_words.WORDS)
