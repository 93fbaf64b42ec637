"""Effects: a table of the classes and splits of the inputs, which is shown before any work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.schema import single_chunk
from imgbatch.sources.declared import Origin
from imgbatch.sources.split_words import SPLIT_NAMES
from imgbatch.terminal.plurals import counted

_MAX_SHOWN = 20

Ints = npt.NDArray[np.int64]


class LabelSummary:
    """The number of images by class and split. Memory: some bytes for each class."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()
        self.unlabelled: Counter[int] = Counter()
        self.example = ""
        """An image without a label."""

    def add(self, labels: pa.Array, splits: Ints, uris: pa.Array | pa.ChunkedArray) -> None:
        """Count images. A null label means that an image has none."""
        table = pa.table({"label": labels, "split": splits})
        for row in table.group_by(["label", "split"]).aggregate([([], "count_all")]).to_pylist():
            if row["label"] is None:
                self.unlabelled[row["split"]] += row["count_all"]
            else:
                self.counts[row["label"], row["split"]] += row["count_all"]
        if labels.null_count and not self.example:
            self.example = single_chunk(uris).filter(pc.is_null(labels))[0].as_py()

    def lines(self, origins: Sequence[Origin]) -> list[str]:
        """Return the table: the first twenty classes, the sum of the rest, and where labels and splits come from."""
        used = [code for code in range(3) if any(split == code for _, split in self.counts) or self.unlabelled[code]]
        names = sorted({name for name, _ in self.counts})
        rows = [(name, [self.counts[name, code] for code in used]) for name in names[:_MAX_SHOWN]]
        if rest := names[_MAX_SHOWN:]:
            rows.append(
                (f"{len(rest):,} more classes", [sum(self.counts[name, code] for name in rest) for code in used])
            )
        if self.unlabelled:
            rows.append(("without a label", [self.unlabelled[code] for code in used]))
        rows.append(("all", [sum(counts[at] for _, counts in rows) for at in range(len(used))]))
        width = max(len("class"), *(len(name) for name, _ in rows))
        lines = [f"{'class':{width}}" + "".join(f" {SPLIT_NAMES[code]:>9}" for code in used)]
        lines += [f"{name:{width}}" + "".join(f" {count:>9,}" for count in counts) for name, counts in rows]
        lines += [f"{origin.uri}: labels from {origin.labels}, splits from {origin.splits}" for origin in origins]
        if self.example:
            lines.append(f"{counted(sum(self.unlabelled.values()), 'image')} without a label, such as {self.example}")
        return lines

    def public(self, origins: Sequence[Origin]) -> dict[str, Any]:
        """Return the same as JSON: classes by split, images without a label, and where both come from."""
        classes: dict[str, dict[str, int]] = {}
        for (name, split), count in sorted(self.counts.items()):
            classes.setdefault(name, {})[SPLIT_NAMES[split]] = count
        return {
            "classes_by_split": classes,
            "unlabelled": sum(self.unlabelled.values()),
            "unlabelled_example": self.example,
            "sources": [{"uri": origin.uri, "labels": origin.labels, "splits": origin.splits} for origin in origins],
        }
