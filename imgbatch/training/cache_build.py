"""Effects: preparation of images on the cluster: they are fetched, decoded and written as shards, or recorded as rejects."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.config.sections import ClusterConfig
from imgbatch.engine.attempts import run_attempts
from imgbatch.engine.dataset import Attempt, Images
from imgbatch.engine.placement import Plan
from imgbatch.inference.messages import received
from imgbatch.ledger.tar_cursor import reject_duplicates
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.rejects import Refusal, is_passing
from imgbatch.schema import single_chunk
from imgbatch.sources.base import is_stream
from imgbatch.terminal.progress import Progress
from imgbatch.training.cache import READ, ROWS, Keys, Preparation, Prepare, keys_of, shards, with_late_sidecars
from imgbatch.uri_index import first_of_each, uri_keys

log = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Prepared:
    """n images, ready or rejected, in the order of the listing; members in the order of their tar."""

    images: pa.Table
    """`ROWS`, and the listing's `container`."""
    failed_tars: pa.Table
    """The same columns, for tars that could not be read to their end."""

    @property
    def read(self) -> Mask:
        """A mask of the images that could be read."""
        return np.asarray(self.images["reason"].is_null())

    @property
    def aspects(self) -> npt.NDArray[np.float32]:
        """The width / height of each image; 1 for one that could not be read."""
        width, height = (np.asarray(self.images[name].fill_null(1)) for name in ("width", "height"))
        ratio: npt.NDArray[np.float32] = (width / height).astype(np.float32)
        return ratio

    @property
    def keys(self) -> Keys:
        """The keys of their arrays in the shards."""
        return keys_of(self.images)

    @property
    def rejects(self) -> pa.Table:
        """The images and tars that could not be read, and why."""
        refused = self.images.filter(pc.is_valid(self.images["reason"]))
        return pa.concat_tables([refused, self.failed_tars]).select(["uri", "stage", "reason", "message"])


@dataclass
class _Images:
    """Receives the blocks of `run_attempts`: records which images and streams have shards."""

    work_plan: WorkPlan
    arrived: int = 0
    rejected: int = 0
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)

    def take(self, block: pa.Table) -> None:
        """Take one block of rows, whose shards are in the store.

        Raises:
            ImgbatchError: the block contains an error.
        """
        rows, notes, ends = received(block)
        for note in notes:
            for node, fault in note.get("left_out", {}).items():
                if node not in self.left_out:
                    log.warning("node %s: %s: the node is left out", fault["host"], fault["why"])
                self.left_out[node] = fault
        numbers = rows["index"].to_numpy()
        # Rows of images in a stream have its number, which is pending until it is read to its end.
        self.work_plan.mark_arrived(numbers[~self.work_plan.in_streams(numbers)])
        self.work_plan.mark_arrived(end.number for end in ends if end.whole)
        self.arrived += len(rows)
        self.rejected += len(rows) - rows["reason"].null_count


def prepare(work: Preparation, listed: pa.Table, work_plan: WorkPlan, plan: Plan, limits: ClusterConfig) -> Prepared:
    """Make all missing shards; return the images of the plan with the rows of their shards.

    Images with transient rejects are retried.

    Args:
        listed: the listing's `uri` and carried columns.

    Raises:
        ClusterError: the workers hang, or so many images were lost that the cluster must be at fault.
    """
    selected = work_plan.pending.copy()
    finished = _finished(work, work_plan)
    images = _Images(work_plan.restricted(selected & ~finished))
    pending = images.work_plan.remaining
    on_cpus = replace(plan, split=False, actors=plan.cpus, min_actors=1, max_actors=plan.cpus)
    shown = Progress("preparing images", images.work_plan.total)
    # If shards of an earlier run exist, images without a shard may have killed their process in that run.
    retried = pending if finished.any() else 0
    attempts = run_attempts(
        partial(_prepare_images, work), on_cpus, images, limits, on_attempt=shown.start, retried=retried
    )
    with closing(shown), closing(attempts) as blocks:
        for block in blocks:
            if block is not None:
                images.take(block)
            shown.update(images.arrived, images.rejected)
    return _collect(work, listed, selected, images.work_plan)


def _prepare_images(work: Preparation, attempt: Attempt) -> Iterator[pa.Table]:
    """Fetch and decode the pending images of an attempt, and write them as shards, in one actor per core."""
    yield from Images(attempt, work).map_actors(Prepare)


def _finished(work: Preparation, work_plan: WorkPlan) -> Mask:
    """Return a mask of the images and tars that need no further attempt: read, or rejected for a permanent reason."""
    finished = np.zeros(len(work_plan.pending), bool)
    for shard in shards(work.shards):
        numbers, refused = shard.rows["index"].to_numpy(), np.asarray(shard.rows["reason"].is_valid())
        finished[numbers[~refused]] = True
        for row in shard.rows.select(["index", "stage", "reason"]).filter(pa.array(refused)).to_pylist():
            if not is_passing(row["stage"], row["reason"]):
                finished[row["index"]] = True
    finished[list(work_plan.streams)] = False
    finished[_complete_tars(work)] = True
    return finished


def _complete_tars(work: Preparation) -> list[int]:
    """Return the numbers of the tars that were read to their end."""
    return [int(name.removesuffix(READ)) for name in work.shards.names() if name.endswith(READ)]


def _collect(work: Preparation, listed: pa.Table, selected: Mask, missing: WorkPlan) -> Prepared:
    """Return the selected images with the rows of their shards, and with a reject for each image without a row."""
    rows = [_lost_rows(listed, missing), *(shard.rows for shard in shards(work.shards))]
    images = pa.concat_tables([ROWS.empty_table(), *rows], promote_options="permissive").select(ROWS.names).cast(ROWS)
    images = _one_row_each(images.filter(pa.array(selected[images["index"].to_numpy()])))
    entries = listed.take(images["index"])
    is_tar = is_stream(entries)
    tars = pc.if_else(is_tar, single_chunk(entries["uri"]), None)
    images = with_late_sidecars(images, tars, work.shards, work.config.source)
    images = images.append_column("container", entries["container"])
    is_tar_itself = pc.and_(pc.equal(images["uri"], entries["uri"]), is_tar)
    failed_tars = images.filter(is_tar_itself)
    images = images.filter(pc.invert(is_tar_itself))
    images = reject_duplicates(images, ~first_of_each(uri_keys(single_chunk(images["uri"]))))
    images = images.sort_by([("index", "ascending"), ("offset", "ascending")]).combine_chunks()
    # A transient reject of a tar no longer holds if the tar was read to its end later.
    reasons = failed_tars.select(["stage", "reason"]).to_pylist()
    transient = np.array([is_passing(row["stage"], row["reason"]) for row in reasons], bool)
    resolved = np.isin(failed_tars["index"].to_numpy(), _complete_tars(work)) & transient
    failed_tars = failed_tars.filter(pa.array(~resolved))
    return Prepared(images, failed_tars.filter(pa.array(first_of_each(uri_keys(single_chunk(failed_tars["uri"]))))))


def _lost_rows(listed: pa.Table, missing: WorkPlan) -> pa.Table:
    """Return rejects for the images that ended their process in each attempt."""
    lost = np.flatnonzero(missing.pending)
    refusal = Refusal("decode", "crashed", "its process died in each attempt")
    entries = listed.take(pa.array(lost))
    columns = {name: entries[name].cast(ROWS.field(name).type) for name in listed.column_names if name in ROWS.names}
    columns["index"] = pa.array(lost, pa.int64())
    for name in ("stage", "reason", "message"):
        columns[name] = pa.repeat(getattr(refusal, name), len(lost))
    return pa.table(columns)


def _one_row_each(images: pa.Table) -> pa.Table:
    """Return one row of each image, in the order of the listing.

    An image has two rows if its tar was read twice, or if it was retried. A row without a reject is preferred.
    """
    images = images.append_column("rejected", pc.is_valid(images["reason"]))
    images = images.sort_by([("index", "ascending"), ("offset", "ascending"), ("rejected", "ascending")])
    first_rows = np.unique(keys_of(images), return_index=True)[1]
    return images.drop_columns("rejected").take(pa.array(np.sort(first_rows))).combine_chunks()
