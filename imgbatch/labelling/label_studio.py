"""Values: tasks for Label Studio with the model's answers as predictions, and the labelling config for them.

Up to `MAX_CHOICES` classes are radio buttons (`Choices`). More are a tree that can be searched (`Taxonomy`), with the levels of
the model's taxonomy if it has one. The export of Label Studio has the numbers of predictions only, so the image, what the
model said and the run are in `data` as well. `sources/label_studio.py` reads that export.
"""

from __future__ import annotations

import math
import re
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from imgbatch.errors import InputError, ModelError
from imgbatch.labelling.columns import PREDICTED
from imgbatch.labelling.json_values import plain

if TYPE_CHECKING:
    from imgbatch.models.model import Model

CONTROL, IMAGE = "label", "image"
"""The names of the two elements of the labelling config. That of the control is the column in the export that is read back."""
MAX_CHOICES = 50

_SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "azure-blob", "abfs": "azure-blob",
            "abfss": "azure-blob", "http": "http", "https": "https"}  # fmt: skip
"""The schemes of stores, and how Label Studio names them."""
_MEMBER = re.compile(r"(?i)\.(tar|tar\.gz|tgz|parquet)#")


@dataclass(frozen=True)
class Classes:
    """The classes of a model, as Label Studio shows them."""

    paths: Sequence[Sequence[str]]
    """The nodes from the root of the tree to each class; the class alone without a taxonomy."""

    @cached_property
    def _path_of(self) -> dict[str, Sequence[str]]:
        return {path[-1]: path for path in self.paths}

    @classmethod
    def of(cls, model: Model) -> Classes:
        """Return the classes of a model."""
        if len(model.labels) <= MAX_CHOICES or model.taxonomy is None:
            return cls([[label] for label in model.labels])
        return cls([model.taxonomy.path(label_id) for label_id in range(len(model.labels))])

    @property
    def kind(self) -> str:
        """The type of the results: `choices` or `taxonomy`."""
        return "choices" if len(self.paths) <= MAX_CHOICES else "taxonomy"

    def value(self, label: str) -> dict[str, Any] | None:
        """Return a class as the value of a result; None for an unknown class."""
        path = self._path_of.get(label)
        if path is None:
            return None
        return {"choices": [label]} if self.kind == "choices" else {"taxonomy": [list(path)]}

    def config(self) -> str:
        """Return the labelling config: the image, and the classes to choose from.

        Raises:
            ModelError: the name of a class has characters that XML cannot hold.
        """
        view = ET.Element("View")
        ET.SubElement(view, "Image", name=IMAGE, value=f"${IMAGE}", zoom="true")
        common = {"name": CONTROL, "toName": IMAGE}
        if self.kind == "choices":
            control = ET.SubElement(view, "Choices", {**common, "choice": "single", "showInline": "true"})
        else:
            control = ET.SubElement(view, "Taxonomy", {**common, "leafsOnly": "true", "maxUsages": "1"})
        nodes: dict[tuple[str, ...], ET.Element] = {(): control}
        for path in self.paths:
            for depth in range(1, len(path) + 1):
                key = tuple(path[:depth])
                if key not in nodes:
                    nodes[key] = ET.SubElement(nodes[key[:-1]], "Choice", value=path[depth - 1])
        ET.indent(view)
        text = ET.tostring(view, encoding="unicode")
        try:
            ET.fromstring(text)
        except ET.ParseError as error:
            raise ModelError(
                f"the name of a class has characters that XML cannot hold ({error}): rename it with model.labels, or export a "
                "manifest"
            ) from error
        return text + "\n"


def task_of(row: Mapping[str, Any], classes: Classes) -> dict[str, Any]:
    """Return a row of a manifest as a task.

    Raises:
        InputError: Label Studio cannot open the image.
    """
    data = {name: _plain(value) for name, value in row.items() if name != CONTROL and value is not None}
    task: dict[str, Any] = {"data": {IMAGE: image_url(row["uri"]), **data}}
    label = row.get(PREDICTED)
    value = classes.value(label) if label is not None else None
    if value is not None:
        result = {"from_name": CONTROL, "to_name": IMAGE, "type": classes.kind, "value": value}
        prediction = {"model_version": row.get("model"), "score": _plain(row.get("score")), "result": [result]}
        task["predictions"] = [{name: value for name, value in prediction.items() if value is not None}]
    return task


def image_url(uri: str) -> str:
    """Return the URL under which Label Studio opens an image.

    >>> image_url("az://photos/a.jpg"), image_url("/data/a b.jpg")
    ('azure-blob://photos/a.jpg', '/data/local-files/?d=data/a%20b.jpg')

    Raises:
        InputError: the image is in a container, or in a store that Label Studio does not know.
    """
    scheme, separator, rest = uri.partition("://")
    if _MEMBER.search(uri):
        raise InputError(
            f"{uri} is in a container, of which Label Studio cannot open single images: export a manifest, or copy the images "
            "to objects of their own"
        )
    if not separator:
        return f"/data/local-files/?d={urllib.parse.quote(uri.lstrip('/'))}"
    if scheme not in _SCHEMES:
        raise InputError(f"{uri}: Label Studio has no storage for {scheme}://: export a manifest")
    if scheme in ("abfs", "abfss") and "@" in rest.partition("/")[0]:  # container@account.dfs.core.windows.net/…
        rest = f"{rest.partition('@')[0]}/{rest.partition('/')[2]}"
    return f"{_SCHEMES[scheme]}://{rest}"


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it; numbers with 6 decimals."""
    return round(value, 6) if isinstance(value, float) and math.isfinite(value) else plain(value)
