"""Effects: has images fetched and decoded on the cluster and kept as shards, and books those that cannot be read."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.concurrency.monitor import tick
from imgbatch.concurrency.polling import poll_items
from imgbatch.engine import placement
from imgbatch.engine.units import ROUNDS
from imgbatch.errors import ClusterError
from imgbatch.inference.messages import received
from imgbatch.ledger.listing import WorkPlan
from imgbatch.ledger.tar_cursor import reject_duplicates
from imgbatch.rejects import Refusal, is_passing
from imgbatch.schema import TAR, single_chunk
from imgbatch.terminal.progress import Progress
from imgbatch.training.cache import READ, ROWS, Keys, Preparation, Prepare, keys_of, shards, with_late_sidecars
from imgbatch.uri_index import first_of_each, uri_keys

log = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Prepared:
    """n images that are ready, or that could not be read, in the order of the listing; those of a tar in its own."""

    images: pa.Table
    """`ROWS`, and the listing's `container`."""
    torn: pa.Table
    """The same of tars that are themselves what could not be read."""

    @property
    def read(self) -> Mask:
        """Which could be read."""
        return np.asarray(self.images["reason"].is_null())

    @property
    def aspects(self) -> npt.NDArray[np.float32]:
        """Width / height of each that could."""
        width, height = (np.asarray(self.images[name].fill_null(1)) for name in ("width", "height"))
        ratio: npt.NDArray[np.float32] = (width / height).astype(np.float32)
        return ratio

    @property
    def keys(self) -> Keys:
        """The names of their arrays in the shards."""
        return keys_of(self.images)

    @property
    def rejects(self) -> pa.Table:
        """What could not be read, and why."""
        refused = self.images.filter(pc.is_valid(self.images["reason"]))
        return pa.concat_tables([refused, self.torn]).select(["uri", "stage", "reason", "message"])


def prepare(
    work: Preparation, listed: pa.Table, work_plan: WorkPlan, plan: placement.Plan, *, stall_s: float
) -> Prepared:
    """Make all shards that are missing; return what the shards say of the images that are to be done.

    What could not be read is tried again, as far as another time may be better.

    Args:
        listed: the listing's `uri` and carried columns.

    Raises:
        ClusterError: the workers hang, or so many images did not come back that it is not their fault.
    """
    wanted = work_plan.pending.copy()
    missing = WorkPlan(wanted & ~_known(work, work_plan), work_plan.row_group_ranges, work_plan.tars)
    here = replace(plan, split=False, actors=plan.cpus, min_actors=1, max_actors=plan.cpus)
    shown = Progress("preparing images", None if work_plan.tars else int(missing.pending.sum()))
    done = rejected = 0
    left_out: dict[str, dict[str, str]] = {}
    rounds = list(ROUNDS)
    with closing(shown):
        while rounds and (before := int(missing.pending.sum())):
            round = rounds[0]
            here = placement.without(here, left_out)
            shown.start(before, round.rows)
            blocks = poll_items(placement.label_images(work, here, missing, round, Prepare), stall_s, closes=True)
            with closing(blocks):
                for block in blocks:
                    tick()
                    if block is not None:
                        rows, notes, tars = received(block)
                        for note in notes:
                            left_out |= note.get("left_out", {})
                        numbers = rows["index"].to_numpy()
                        missing.pending[numbers[~np.isin(numbers, list(work_plan.tars))]] = False
                        missing.pending[[tar["number"] for tar in tars if tar["whole"]]] = False
                        done += len(rows)
                        rejected += len(rows) - rows["reason"].null_count
                    shown.update(done, rejected)
                    if len(left_out) > len(here.left_out):
                        break
            if len(left_out) > len(here.left_out):
                names = (f"{told['host']} ({told['why']})" for told in left_out.values())
                log.warning("nodes are left out, since the network gives wrong answers there: %s", ", ".join(names))
                continue
            rounds.pop(0)
            if (lost := int(missing.pending.sum())) > max(20, round.lost * before):
                raise ClusterError(
                    f"{lost:,} of {before:,} images did not come back: the workers die; look at Ray's logs"
                )
    return _result(work, listed, wanted, missing)


def _known(work: Preparation, work_plan: WorkPlan) -> Mask:
    known = np.zeros(len(work_plan.pending), bool)
    for shard in shards(work.shards):
        numbers, refused = shard.rows["index"].to_numpy(), np.asarray(shard.rows["reason"].is_valid())
        known[numbers[~refused]] = True
        for row in shard.rows.select(["index", "stage", "reason"]).filter(pa.array(refused)).to_pylist():
            if not is_passing(row["stage"], row["reason"]):
                known[row["index"]] = True
    known[list(work_plan.tars)] = False
    known[_whole_tars(work)] = True
    return known


def _whole_tars(work: Preparation) -> list[int]:
    """Return the numbers of the tars that were read to their end."""
    return [int(name.removesuffix(READ)) for name in work.shards.names() if name.endswith(READ)]


def _result(work: Preparation, listed: pa.Table, wanted: Mask, missing: WorkPlan) -> Prepared:
    lost = np.flatnonzero(missing.pending)
    refusal = Refusal("decode", "crashed", "its decoder ended the process, again and again")
    entries = listed.take(pa.array(lost))
    columns = {name: entries[name].cast(ROWS.field(name).type) for name in listed.column_names if name in ROWS.names}
    columns["index"] = pa.array(lost, pa.int64())
    for name in ("stage", "reason", "message"):
        columns[name] = pa.repeat(getattr(refusal, name), len(lost))
    found = [pa.table(columns), *(shard.rows for shard in shards(work.shards))]
    images = pa.concat_tables([ROWS.empty_table(), *found], promote_options="permissive").select(ROWS.names).cast(ROWS)
    images = images.filter(pa.array(wanted[images["index"].to_numpy()]))
    # An image may be there twice: its tar was read twice, or it was tried again. What could be read goes first.
    images = images.append_column("rejected", pc.is_valid(images["reason"]))
    images = images.sort_by([("index", "ascending"), ("offset", "ascending"), ("rejected", "ascending")])
    once = np.unique(keys_of(images), return_index=True)[1]
    images = images.drop_columns("rejected").take(pa.array(np.sort(once))).combine_chunks()
    entries = listed.take(images["index"])
    tars = pc.if_else(
        pc.fill_null(pc.equal(single_chunk(entries["container"]), TAR), False), single_chunk(entries["uri"]), None
    )
    images = with_late_sidecars(images, tars, work.shards, work.config.source)
    images = images.append_column("container", entries["container"])
    itself = pc.and_(pc.equal(images["uri"], entries["uri"]), pc.fill_null(pc.equal(images["container"], TAR), False))
    torn = images.filter(itself)
    images = images.filter(pc.invert(itself))
    images = reject_duplicates(images, ~first_of_each(uri_keys(single_chunk(images["uri"]))))
    images = images.sort_by([("index", "ascending"), ("offset", "ascending")]).combine_chunks()
    passing = [is_passing(row["stage"], row["reason"]) for row in torn.select(["stage", "reason"]).to_pylist()]
    settled = np.isin(torn["index"].to_numpy(), _whole_tars(work)) & np.array(passing, bool)  # by a later reading
    torn = torn.filter(pa.array(~settled))
    return Prepared(images, torn.filter(pa.array(first_of_each(uri_keys(single_chunk(torn["uri"]))))))
