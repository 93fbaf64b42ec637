"""Effects: what a label table says of images whose class is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import AuditError, BudgetError, ModelError
from imgbatch.evaluation.classes import Classes
from imgbatch.evaluation.ground_truth import Numbers, Truths
from imgbatch.evaluation.metrics import before_temperature
from imgbatch.evaluation.training_images import NOT_COMPARED, TrainingImages
from imgbatch.ledger.commit_log import Log
from imgbatch.models.model import Model
from imgbatch.models.taxonomy import Level
from imgbatch.schema import CONTENT_HASH, LABELS, LISTING, REJECTS
from imgbatch.storage.stores import Folder
from imgbatch.terminal.plurals import plural

TOP = 5
READ = ["uri", "label", "score", "top_k", "levels", "answer", "answer_level", "size", "etag", "last_modified", "model"]
_SHOWN = 5

PREDICTIONS = pa.schema([
    LABELS.field("uri"), pa.field("truth", pa.string()),
    *[LABELS.field(name) for name in ("label", "score", "top_k", "levels", "answer", "answer_level")],
    pa.field("right", pa.bool_()), pa.field("right_in_top5", pa.bool_()), pa.field("answer_right", pa.bool_()),
])  # fmt: skip
"""A row for each image that was scored; `answer_right` is null where there was no answer."""


class Scored:
    """What a model said of the images, each at its number: 10 bytes an image and 4 a level."""

    def __init__(
        self,
        truths: Truths,
        model: Model,
        temperature: float | None = None,
        training_images: TrainingImages | None = None,
    ) -> None:
        n = len(truths)
        self.model, self.truth, self.temperature = model, truths.of(model), temperature
        self.levels: tuple[Level, ...] = model.taxonomy.levels if model.taxonomy else ()
        self.label: Numbers = np.full(n, -1, np.int32)
        self.score = np.zeros(n, np.float32)
        self.in_top = np.zeros(n, bool)
        self.nodes: Numbers = np.full((n, len(self.levels)), -1, np.int32)
        """The predicted node at each level, coarse to fine."""
        self.answer_level = np.full(n, -1, np.int8)
        self.before = np.full(n, np.nan) if temperature is not None else None
        """The score before temperature scaling; NaN where the table does not hold all probabilities."""
        self.most = 0
        """The most classes that a row names."""
        self.training_images = training_images
        """What the model has seen in training; None: not known, or the table does not hold the hashes of its images."""
        self.seen = np.full(n, NOT_COMPARED, np.int8)
        """What `TrainingImages.codes` says of each image."""
        self._truths = truths

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Which images have their true class as label."""
        found: npt.NDArray[np.bool_] = np.equal(self.label, self.truth)
        return found

    def right_at(self, depth: int) -> npt.NDArray[np.bool_]:
        """Return which images have their true node at a level."""
        true = np.array(self.levels[depth].node_of)[self.truth]
        found: npt.NDArray[np.bool_] = np.equal(self.nodes[:, depth], true)
        return found

    def take(self, labels: Folder) -> Iterator[pa.Table]:
        """Read a label table; yield its rows on images of the evaluation, as PREDICTIONS and the columns of a listing.

        Raises:
            ModelError: another model than ours has written them.
        """
        log = Log(labels)
        log.scan()
        columns = [*READ]
        if self.training_images is not None:
            if has_hashes(log):
                columns.append(CONTENT_HASH)
            else:
                self.training_images = None
        for _, part, _ in log.read(columns):
            numbers = self._truths.numbers(part["uri"].combine_chunks())
            rows = part.filter(pa.array(numbers >= 0)).combine_chunks()
            if len(rows):
                self._require_ours(rows["model"], labels)
                yield self._take(rows, numbers[numbers >= 0])

    def _take(self, rows: pa.Table, at: Numbers) -> pa.Table:
        classes = Classes(self.model.labels)
        self.label[at] = self._known(classes.numbers(rows["label"]), rows["label"], "label")
        self.score[at] = rows["score"].to_numpy()
        candidates = rows["top_k"].combine_chunks()
        starts = candidates.offsets.to_numpy()
        image = np.repeat(np.arange(len(rows)), np.diff(starts))
        named = candidates.flatten()
        ids = classes.numbers(named.field("label"))
        place = np.arange(len(ids)) - (starts[:-1] - starts[0])[image]
        self.in_top[at[image[(ids == self.truth[at][image]) & (place < TOP)]]] = True
        lengths = np.diff(starts)
        self.most = max(self.most, int(lengths.max(initial=0)))
        if self.before is not None and self.temperature and (lengths == len(self.model.labels)).all():
            self.before[at] = before_temperature(
                named.field("score").to_numpy().reshape(len(rows), -1), self.temperature
            )
        if self.training_images is not None:
            self.seen[at] = self.training_images.codes(rows[CONTENT_HASH].to_numpy())
        answered = self._answers(rows, at)
        true = pa.array(self.model.labels, pa.string()).take(pa.array(self.truth[at]))
        table = rows.append_column("truth", true).append_column("right", pa.array(self.right[at]))
        table = table.append_column("right_in_top5", pa.array(self.in_top[at])).append_column("answer_right", answered)
        table = table.append_column("container", self._truths.containers(at))
        # Of all classes, where they were asked for because of the temperature, a file would grow to kilobytes an image.
        first = pc.list_slice(candidates, 0, TOP)
        table = table.set_column(table.schema.get_field_index("top_k"), "top_k", first)
        return table.select([*PREDICTIONS.names, *LISTING.names[1:]])

    def _answers(self, rows: pa.Table, at: Numbers) -> pa.Array:
        """Read the levels; return whether each answer is right, null where there is none."""
        if rows["levels"].null_count or not self.levels:
            return pa.array(self.right[at])
        told, names = rows["levels"].combine_chunks().flatten(), [level.name for level in self.levels]
        if len(told) != len(rows) * len(names) or told.field("level")[: len(names)].to_pylist() != names:
            raise ModelError(
                f"the labels have other levels than {self.model.name} has now, {', '.join(names)}: its taxonomy was another "
                "one; label the images again"
            )
        for depth, level in enumerate(self.levels):
            nodes = told.field("label")[depth :: len(names)]
            self.nodes[at, depth] = self._known(Classes(level.nodes).numbers(nodes), nodes, level.name)
        depths = Classes(names).numbers(rows["answer_level"])
        self.answer_level[at] = depths
        right = np.stack([self.right_at(depth)[at] for depth in range(len(names))], 1)[np.arange(len(at)), depths]
        return pa.array(right, mask=depths < 0)

    def _known(self, numbers: Numbers, names: pa.Array | pa.ChunkedArray, what: str) -> Numbers:
        """Return the numbers; ModelError if a name has none."""
        if (numbers < 0).any():
            name = names[int(np.argmax(numbers < 0))].as_py()
            raise ModelError(
                f"the labels say {what} {name!r}, which {self.model.name} does not have: they were written with other "
                "model.labels, or another taxonomy"
            )
        return numbers

    def _require_ours(self, models: pa.ChunkedArray, labels: Folder) -> None:
        for reference in pc.unique(models).to_pylist():
            if reference.rpartition("@")[2] != self.model.reference.rpartition("@")[2]:
                raise ModelError(
                    f"{labels.uri} was written by {reference}, not by {self.model.reference}: name it with --model"
                )

    def require_all(self, output: Folder) -> None:
        """Refuse figures over fewer images than were listed.

        Raises:
            BudgetError: images were rejected; with their names and reasons.
            AuditError: images are in neither table.
        """
        missing = np.flatnonzero(self.label < 0)
        if not len(missing):
            return
        told, total = [], 0
        log = Log(output.folder("rejects"))
        log.scan()
        for _, part, _ in log.read(["uri", REJECTS.field("reason").name]):
            numbers = self._truths.numbers(part["uri"].combine_chunks())
            rows = part.filter(pa.array(numbers >= 0))
            total += len(rows)
            told += [f"{row['uri']} ({row['reason']})" for row in rows.slice(0, _SHOWN).to_pylist()]
        scored = f"{len(self.label) - len(missing):,} of {len(self.label):,} images were scored"
        if total < len(missing):
            raise AuditError(
                f"{scored}; {len(missing) - total:,} are in neither labels/ nor rejects/ of {output.uri}: have all of "
                "them labelled first, by the same input"
            )
        more = ", …" if total > _SHOWN else ""
        raise BudgetError(
            f"{scored}; {total:,} {plural(total, 'has', 'have')} no label: {', '.join(told[:_SHOWN])}{more}. Figures over "
            f"the rest would flatter: fix these images or leave them out of the input; all are in {output.at('rejects')}"
        )


def has_hashes(log: Log) -> bool:
    """Return whether the parts of a log were written with `output.content_hash`: all of them were, or none.

    Args:
        log: `scan` has been called.
    """
    return bool(log.numbers) and bool(log.footer(log.numbers[-1]).fingerprint.get("output.content_hash"))


def worst(so_far: pa.Table | None, rows: pa.Table, most: int) -> pa.Table:
    """Return the rows that are wrong with the highest scores, of those so far and new ones."""
    wrong = rows.filter(pc.invert(rows["right"])).sort_by([("score", "descending")]).slice(0, most)
    both: Any = wrong if so_far is None else pa.concat_tables([so_far, wrong]).sort_by([("score", "descending")])
    return both.slice(0, most)
