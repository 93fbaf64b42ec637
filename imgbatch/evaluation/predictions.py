"""Effects: label tables, read and compared with the true classes of their images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.errors import AuditError, BudgetError, ModelError
from imgbatch.evaluation.classes import Classes
from imgbatch.evaluation.ground_truth import GroundTruth, Numbers
from imgbatch.evaluation.metrics import before_temperature
from imgbatch.evaluation.scores import TOP, Ints, Scores
from imgbatch.evaluation.training_images import NOT_COMPARED, TrainingImages
from imgbatch.ledger.commit_log import Log
from imgbatch.models.model import Model
from imgbatch.schema import CONTENT_HASH, LABELS, REJECTS
from imgbatch.storage.stores import Folder
from imgbatch.terminal.plurals import plural

READ = ["uri", "label", "score", "top_k", "levels", "answer", "answer_level", "model"]
_SHOWN = 5
_VERSIONS = pa.schema([LABELS.field(name) for name in ("uri", "size", "etag", "last_modified")])

PREDICTIONS = pa.schema([
    LABELS.field("uri"), pa.field("truth", pa.string()),
    *[LABELS.field(name) for name in ("label", "score", "top_k", "levels", "answer", "answer_level")],
    pa.field("right", pa.bool_()), pa.field("right_in_top5", pa.bool_()), pa.field("answer_right", pa.bool_()),
])  # fmt: skip
"""A row for each image that was scored; `answer_right` is null without an answer."""


class LabelReader:
    """Reads label tables: the predictions of a model for the images of an evaluation, by their numbers."""

    def __init__(
        self,
        truths: GroundTruth,
        model: Model,
        temperature: float | None = None,
        training_images: TrainingImages | None = None,
    ) -> None:
        truth, n = truths.of(model), len(truths)
        self.model, self.temperature = model, temperature
        levels = model.taxonomy.levels if model.taxonomy else ()
        self.scores = Scores.unknown(truth, len(model.labels), levels, scaled=temperature is not None)
        """See `Scores`; filled in by `take`."""
        self.answer_level = np.full(n, -1, np.int8)
        """The depth of each image's answer in the taxonomy; -1 without an answer."""
        self.training_images = training_images
        """The images that the model has seen in training; None: unknown, or the table lacks the hashes of its images."""
        self.seen = np.full(n, NOT_COMPARED, np.int8)
        """The code of each image in `TrainingImages.codes`."""
        self._truths = truths

    def take(self, labels: Folder) -> Iterator[pa.Table]:
        """Read a label table; yield its rows on images of the evaluation, as PREDICTIONS.

        Raises:
            ModelError: the table was written by another model.
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
                self._require_same_model(rows["model"], labels)
                yield self._take(rows, numbers[numbers >= 0])

    def _take(self, rows: pa.Table, at: Numbers) -> pa.Table:
        scores, labels = self.scores, self.model.labels
        scores.label[at] = self._require_known(Classes(labels).numbers(rows["label"]), rows["label"], "label")
        scores.score[at] = rows["score"].to_numpy()
        self._take_candidates(rows["top_k"].combine_chunks(), at)
        if self.training_images is not None:
            self.seen[at] = self.training_images.codes(rows[CONTENT_HASH].to_numpy())
        answer_right = self._take_levels(rows, at)
        truth = pa.array(labels, pa.string()).take(pa.array(scores.truth[at]))
        table = rows.append_column("truth", truth).append_column("right", pa.array(scores.right[at]))
        table = table.append_column("right_in_top5", pa.array(scores.in_top[at]))
        table = table.append_column("answer_right", answer_right)
        # If the model has a temperature, rows name all classes. With all of them a file would take kilobytes an image.
        best = pc.list_slice(rows["top_k"].combine_chunks(), 0, TOP)
        table = table.set_column(table.schema.get_field_index("top_k"), "top_k", best)
        return table.select(PREDICTIONS.names)

    def _take_candidates(self, candidates: pa.ListArray, at: Numbers) -> None:
        """Read the classes that each row names, the best first, with their scores."""
        scores, starts = self.scores, candidates.offsets.to_numpy()
        lengths = np.diff(starts)
        image = np.repeat(np.arange(len(candidates)), lengths)
        values = candidates.flatten()
        ids = Classes(self.model.labels).numbers(values.field("label"))
        rank = np.arange(len(ids)) - (starts[:-1] - starts[0])[image]
        scores.in_top[at[image[(ids == scores.truth[at][image]) & (rank < TOP)]]] = True
        scores.max_candidates = max(scores.max_candidates, int(lengths.max(initial=0)))
        if scores.score_before is not None and self.temperature and (lengths == scores.number_of_classes).all():
            probabilities = values.field("score").to_numpy().reshape(len(candidates), -1)
            scores.score_before[at] = before_temperature(probabilities, self.temperature)

    def _take_levels(self, rows: pa.Table, at: Numbers) -> pa.Array:
        """Read the levels; return whether each answer is right, null where there is none."""
        scores = self.scores
        if rows["levels"].null_count or not scores.levels:
            return pa.array(scores.right[at])
        values, names = rows["levels"].combine_chunks().flatten(), [level.name for level in scores.levels]
        if len(values) != len(rows) * len(names) or values.field("level")[: len(names)].to_pylist() != names:
            raise ModelError(
                f"the labels have other levels than {self.model.name} has now, {', '.join(names)}: its taxonomy was another "
                "one; label the images again"
            )
        for depth, level in enumerate(scores.levels):
            nodes = values.field("label")[depth :: len(names)]
            scores.nodes[at, depth] = self._require_known(Classes(level.nodes).numbers(nodes), nodes, level.name)
        depths = Classes(names).numbers(rows["answer_level"])
        self.answer_level[at] = depths
        right = np.stack([scores.right_at(depth)[at] for depth in range(len(names))], 1)[np.arange(len(at)), depths]
        return pa.array(right, mask=depths < 0)

    def _require_known(self, numbers: Numbers, names: pa.Array | pa.ChunkedArray, kind: str) -> Numbers:
        """Return the numbers; raise ModelError if a name has none."""
        if (numbers < 0).any():
            name = names[int(np.argmax(numbers < 0))].as_py()
            raise ModelError(
                f"the labels contain the {kind} {name!r}, which {self.model.name} does not have: they were written with "
                "other model.labels, or another taxonomy"
            )
        return numbers

    def _require_same_model(self, models: pa.ChunkedArray, labels: Folder) -> None:
        for reference in pc.unique(models).to_pylist():
            if reference.rpartition("@")[2] != self.model.reference.rpartition("@")[2]:
                raise ModelError(
                    f"{labels.uri} was written by {reference}, not by {self.model.reference}: name it with --model"
                )

    def images(self, labels: Folder, numbers: Ints) -> pa.Table:
        """Read the URIs and versions of some images again, in the order of their numbers.

        Args:
            numbers: ascending.
        """
        log = Log(labels)
        log.scan()
        parts, found = [_VERSIONS.empty_table()], [np.zeros(0, np.int32)]
        for _, part, _ in log.read(_VERSIONS.names):
            at = self._truths.numbers(part["uri"].combine_chunks())
            mask = np.isin(at, numbers)
            parts.append(part.filter(pa.array(mask)).select(_VERSIONS.names))
            found.append(at[mask])
        order = np.argsort(np.concatenate(found), kind="stable")
        return pa.concat_tables(parts).take(pa.array(order)).combine_chunks()

    def require_all(self, output: Folder) -> None:
        """Refuse figures over fewer images than were listed.

        Raises:
            BudgetError: images were rejected. The message has their names and reasons.
            AuditError: images are in neither table.
        """
        n, missing = len(self.scores.label), int(np.count_nonzero(self.scores.label < 0))
        if not missing:
            return
        examples, rejected = [], 0
        log = Log(output.folder("rejects"))
        log.scan()
        for _, part, _ in log.read(["uri", REJECTS.field("reason").name]):
            numbers = self._truths.numbers(part["uri"].combine_chunks())
            rows = part.filter(pa.array(numbers >= 0))
            rejected += len(rows)
            examples += [f"{row['uri']} ({row['reason']})" for row in rows.slice(0, _SHOWN).to_pylist()]
        scored = f"{n - missing:,} of {n:,} images were scored"
        if rejected < missing:
            raise AuditError(
                f"{scored}; {missing - rejected:,} are in neither labels/ nor rejects/ of {output.uri}: label all "
                "of them first, from the same input"
            )
        ellipsis = ", …" if rejected > _SHOWN else ""
        raise BudgetError(
            f"{scored}; {rejected:,} {plural(rejected, 'has', 'have')} no label: {', '.join(examples[:_SHOWN])}{ellipsis}. "
            "Figures of the other images would be too good: fix these images or omit them from the input; all are in "
            f"{output.at('rejects')}"
        )


def has_hashes(log: Log) -> bool:
    """Return whether the parts of a log were written with `output.content_hash`: all of them were, or none.

    Args:
        log: `scan` has been called.
    """
    return bool(log.numbers) and bool(log.footer(log.numbers[-1]).fingerprint.get("output.content_hash"))
