"""What the tables must hold after any history: a state machine over `world`, with the real job inside.

The model is small. An image has a version (its ETag) and that version an outcome: a label, or a reason. A row that holds
may not be touched; one that does not, may be gone or be one of the right outcome; a run that ends with 0 has one row for
each image it listed.
"""

from __future__ import annotations

import io
import signal
from collections import Counter
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.part_file import decode
from tests.histories.stores import KINDS, LABELS, MOODS, Image
from tests.histories.world import Point, World

NAMES = [f"{name}.png" for name in "abcdefghijk"]
FAULTS = ["killed before", "killed after", "killed in flight", "late", "refused", "unanswered", "away"]
_DEADLY = ("killed before", "killed after", "killed in flight")

Row = dict[str, Any]
Rows = dict[str, Row]
Images = dict[str, tuple[str, str | None]]

_name = st.sampled_from(NAMES)
_texts = ["labels/part", "rejects/part", "replace", "_SUCCESS", "run.json", "listing/", "claim.json"]
_at = st.tuples(st.sampled_from(_texts), st.sampled_from([1, 1, 2, 3]))
_faults = st.dictionaries(_at, st.sampled_from(FAULTS), min_size=1, max_size=3)
_kind = st.sampled_from(KINDS)
_images = st.dictionaries(_name, st.tuples(_kind, st.sampled_from([None, None, *MOODS])), min_size=1, max_size=6)
_notes = st.dictionaries(_name, st.sampled_from([None, "good", "bad", "blurred"]), min_size=1, max_size=6)
_moods = st.dictionaries(_name, st.sampled_from(list(MOODS)), max_size=4)
_settings = st.lists(
    st.sampled_from(["rejects.retry=all", "run.prune=true", "run.commit_interval_s=1000"]), unique=True, max_size=2
)

totals: Counter[str] = Counter()
"""How often each event occurred in all histories of this process."""


class Histories(RuleBasedStateMachine):
    """Any history of a store and of the runs over it."""

    output = "memory://out"

    def __init__(self) -> None:
        super().__init__()
        self.world = self.new_world()
        self.versions = 0
        self.known: dict[str, set[tuple[str, str]]] = {}
        """(ETag, outcome) of each image, for every version and mood that it ever had."""
        self.settled = False
        """Whether the last run ended well."""
        self.alone = True
        """Whether it was the only one running."""
        self.torn: set[str] = set()
        """Images whose old row a second driver took out within it before it died, or lost the store."""
        self.disturbed = False
        """Whether `_SUCCESS` may stand where it should not, until a run ends well: a dead run's, or one of two drivers'."""

    def new_world(self) -> World:
        """Return an empty world."""
        return World()

    @initialize(seed=st.integers(0, 1 << 30), lossy=st.sampled_from([0.0, 0.0, 0.3]))
    def begin(self, seed: int, lossy: float) -> None:
        """Begin with a few images."""
        totals["histories"] += 1
        self.world.chance.seed(seed)
        self.world.lossy = lossy
        for name in NAMES[:5]:
            self._put(name, LABELS[(seed + ord(name[0])) % len(LABELS)], None)

    # What happens to the store

    @rule(images=_images)
    def put(self, images: Images) -> None:
        """Images appear, or are overwritten."""
        for name, (kind, mood) in images.items():
            self._put(name, kind, mood)

    @precondition(lambda self: self.world.images)
    @rule(data=st.data(), mood=st.sampled_from([None, *MOODS]))
    def feel(self, data: Any, mood: str | None) -> None:
        """The store changes its mind about an image, whose bytes stay as they are."""
        name = data.draw(st.sampled_from(sorted(self.world.images)))
        image = self.world.images[name]
        self.world.images[name] = Image(image.kind, image.etag, mood)
        self._remember(name)

    @precondition(lambda self: self.world.images)
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        """An image is deleted."""
        del self.world.images[data.draw(st.sampled_from(sorted(self.world.images)))]

    @rule(notes=_notes)
    def correct(self, notes: dict[str, str | None]) -> None:
        """The manifest is corrected; None: it names an image no more."""
        self.world.notes = {name: note for name, note in {**self.world.notes, **notes}.items() if note is not None}

    @precondition(lambda self: self.world.late)
    @rule()
    def arrive(self) -> None:
        """What a dead run sent arrives now; behind a run that ended well it changes nothing."""
        before, success = self._parts(), self._success()
        for write in self.world.late:
            self.disturbed = self.disturbed or "_SUCCESS" in str(write.args)  # type: ignore[attr-defined]
            try:
                write()
            except Exception:  # noqa: BLE001 - refused, and nobody is there to hear it
                totals["late writes refused"] += 1
            else:
                totals["late writes that landed"] += 1
        self.world.late.clear()
        after = self._parts()
        assert not self.settled or self._success() == success, "a late write changed _SUCCESS"
        assert not self.settled or after.keys() == before.keys(), "a late write got behind the seals"
        # A part that a second driver was about to rewrite is made another one by the next run, not by the first driver.
        assert not (self.settled and self.alone) or after == before, "a late write changed a part behind the seals"

    # What happens to the output

    @rule(data=st.data())
    def lose_a_part(self, data: Any) -> None:
        """Somebody removes a part, because it is damaged or by mistake; the next run makes its rows again."""
        if parts := sorted(self._parts()):
            self.world.folder("").delete(data.draw(st.sampled_from(parts)))
            self.world.late.clear()  # else one of them could take the number, with rows that are there by then
            self.settled, self.disturbed = False, True
            totals["parts lost"] += 1

    @rule(table=st.sampled_from(["labels", "rejects"]))
    def lose_a_table(self, table: str) -> None:
        """Somebody removes a whole table."""
        for name in self._parts():
            if name.startswith(table):
                self.world.folder("").delete(name)
        self.world.late.clear()
        self.settled, self.disturbed = False, True

    # What happens in runs

    @rule(settings=_settings, limit=st.sampled_from([None, None, None, 1, 4]))
    def run(self, settings: list[str], limit: int | None) -> None:
        """A run without faults."""
        self._run(settings, {}, limit)

    @rule(
        table=st.sampled_from(["labels/part", "rejects/part", "replace"]),
        images=_images,
        then=_images,
        readable_again=st.booleans(),
        settings=_settings,
        away=st.sets(_name, max_size=2),
        noted=_notes,
    )
    def run_that_dies_with_a_request_under_way(
        self,
        table: str,
        images: Images,
        then: Images,
        readable_again: bool,
        settings: list[str],
        away: set[str],
        noted: dict[str, str | None],
    ) -> None:
        """A run is killed while it sends a part; the request arrives when the next one has done its work."""
        self.put(images)
        # It may rewrite what the next one would not: some images are away meanwhile, and notes are corrected and then back.
        missing = {name: self.world.images.pop(name) for name in sorted(away & self.world.images.keys())}
        notes = self.world.notes
        self.correct(noted)
        self._run(settings, {(table, 1): "killed in flight"}, None)
        self.world.images.update(missing)
        self.world.notes = notes
        if readable_again:  # so that the next run has no reject to write, and nothing but a seal takes the number
            for name, image in self.world.images.items():
                if image.kind not in LABELS:
                    self._put(name, "a", None)
                elif image.mood:
                    self.world.images[name] = Image(image.kind, image.etag)
                    self._remember(name)
        else:
            self.put(then)
        self._run([], {}, None)
        self.arrive()

    @rule(settings=_settings, faults=_faults, limit=st.sampled_from([None, None, 4]))
    def run_with_faults(self, settings: list[str], faults: dict[Point, str], limit: int | None) -> None:
        """A run in which writes fail, or kill it."""
        self._run(settings, dict(faults), limit)

    @rule(at=_at, signum=st.sampled_from([signal.SIGINT, signal.SIGTERM]))
    def run_with_a_signal(self, at: Point, signum: signal.Signals) -> None:
        """A run that is asked to stop."""
        self._run([], {at: lambda: signal.raise_signal(signum)}, None, allowed={128 + signum})

    @rule(at=_at, name=_name, kind=st.sampled_from([*KINDS, "removed"]))
    def run_while_the_store_changes(self, at: Point, name: str, kind: str) -> None:
        """A run during which an image is overwritten or deleted."""

        def change() -> None:
            if kind == "removed":
                self.world.images.pop(name, None)
            else:
                self._put(name, kind, None)

        self._run([], {at: change}, None, moving=True)

    @rule(at=_at, faults=_faults, after=st.dictionaries(_at, st.sampled_from(_DEADLY), max_size=1), moods=_moods)
    def two_drivers(self, at: Point, faults: dict[Point, str], after: dict[Point, str], moods: dict[str, str]) -> None:
        """A second driver at some moment of the first, for which the store has other moods; nobody is refused."""

        def other() -> None:
            for name in moods.keys() & self.world.images.keys():
                image = self.world.images[name]
                self.world.images[name] = Image(image.kind, image.etag, None if image.mood else moods[name])
                self._remember(name)
            totals["second drivers"] += 1
            before = {*self._rows("labels"), *self._rows("rejects")}
            if self.world.run("run.check_owner=false", faults=dict(faults)) in (None, 3):
                self.torn = before - {*self._rows("labels"), *self._rows("rejects")}

        self._run(["run.check_owner=false"], {**after, at: other}, None, alone=False, moving=True)

    @rule(at=_at)
    def a_second_driver_is_refused(self, at: Point) -> None:
        """A second driver while the first one lives, and the refusal is on."""
        codes: list[int | None] = []
        own = at[0] == "claim.json" or at == (
            "run.json",
            2,
        )  # the first one has not claimed the output yet, or has ended
        self._run([], {at: lambda: codes.append(self.world.run())}, None, alone=not own, moving=own)
        assert set(codes) <= {7} or own, codes
        totals["second drivers refused"] += len(codes)

    @rule(at=_at, kinds=st.dictionaries(_name, _kind, min_size=1, max_size=4))
    def a_driver_stands_still_and_is_taken_over(self, at: Point, kinds: dict[str, str]) -> None:
        """A driver is paused at a write, taken for dead, and wakes up when another one has ended."""
        codes: list[int | None] = []
        success: list[bytes | None] = []

        def other() -> None:
            paused = self.world.drivers[-1].number
            self.world.alive.discard(paused)
            self.put({name: (kind, None) for name, kind in kinds.items()})
            codes.append(self.world.run())
            success.append(self._success())
            self.world.alive.add(paused)

        code = self._run([], {at: other}, None, alone=False, moving=True)
        if codes and at != ("claim.json", 1):  # there it has not claimed the output yet
            totals["drivers taken over"] += 1
            assert code != 0 or at == ("run.json", 2), "a run that was taken over ended well"  # there it had ended
            assert codes != [0] or self._success() == success[0], "the _SUCCESS of a newer run was touched"

    @rule(setting=st.sampled_from(["top_k=3", "answer.min_score=0.1"]))
    def run_with_another_fingerprint(self, setting: str) -> None:
        """A run whose labels would not agree with those that are there."""
        before = self._parts()
        if before:
            assert self.world.run(setting) == 5
            assert self._parts() == before

    @invariant()
    def no_image_is_double(self) -> None:
        """Whatever happened: whole files, and no image twice in a table."""
        for table in ("labels", "rejects"):
            self._rows(table)

    def teardown(self) -> None:
        """At the end all is well: one calm run corrects what is to be corrected, and nothing late undoes it."""
        if not self.known:
            return
        self.arrive()
        self._run([], {}, None)
        self.arrive()
        first = self._run(["rejects.max_share=1"], {}, None)
        labels, rejects = self._rows("labels"), self._rows("rejects")
        assert not labels.keys() & rejects.keys()
        for name, image in self.world.images.items():
            found = labels.get(name) or rejects.get(name)
            assert found is not None, f"{name} is lost"
            assert (found["etag"], _outcome_of(found)) in {(image.etag, image.kind), (image.etag, image.mood)}
        if first == 0:
            assert self.world.verify() == 0
            self._require_notes({"labels": labels, "rejects": rejects})
        totals["kills"] += self.world.killed
        totals["writes failed"] += self.world.failed
        totals["runs"] += self.world.started

    # The model

    def _put(self, name: str, kind: str, mood: str | None) -> None:
        self.versions += 1
        self.world.images[name] = Image(kind, f"e{self.versions}", mood)
        self._remember(name)

    def _remember(self, name: str) -> None:
        image = self.world.images[name]
        outcomes = {(image.etag, image.mood or image.kind), (image.etag, "vanished")}  # it may be deleted in mid-run
        self.known.setdefault(name, set()).update(outcomes)

    def _run(
        self,
        settings: list[str],
        faults: dict[Point, Any],
        limit: int | None,
        *,
        alone: bool = True,
        moving: bool = False,
        allowed: set[int] = frozenset(),  # type: ignore[assignment]
    ) -> int | None:
        """Run, and hold what came of it against what was there before."""
        if limit is not None:
            settings = [setting for setting in settings if setting != "run.prune=true"]
        labels, rejects = self._rows("labels"), self._rows("rejects")
        listed = sorted(self.world.images)[:limit]
        world = {name: self.world.images[name] for name in listed}
        pruned = "run.prune=true" in settings and bool(listed)
        self.torn = set()
        code = self.world.run(*settings, faults=faults, limit=limit)
        driver = self.world.ended
        self.settled, self.alone = code == 0, alone
        after = {"labels": self._rows("labels"), "rejects": self._rows("rejects")}
        if not moving:
            self._require_untouched(world, labels, rejects, after, pruned, retry_all="rejects.retry=all" in settings)
        new = {**_changed(labels, after["labels"]), **_changed(rejects, after["rejects"])}
        for name, row in new.items():
            # A version that came after the listing, and killed its process, is told with what was listed.
            killer = moving and _outcome_of(row) == "crashed" and any(kind == "crashed" for _, kind in self.known[name])
            assert killer or (row["etag"], _outcome_of(row)) in self.known[name], f"{name}: {row}"

        hard = [fault for fault in driver.happened if fault in (*_DEADLY, "away")]
        if code == 0:
            self._require_whole(world, after, moving, pruned)
            if not moving and (limit is None or len(world) < limit):  # else the manifest was not read
                self._require_notes(after)
            assert self.world.verify() == 0 or moving
            self.disturbed = self.disturbed and moving
        elif code == 4:
            assert not moving or not hard
            assert moving or not after["labels"].keys() & world.keys()
        elif code is None:
            assert hard
        else:
            expected = _expected_codes(listed, hard) | allowed | ({2, 3, 6} if moving and not alone else set())
            assert code in expected, code
        reconciled = not self.world.folder("").exists("_SUCCESS") or self.world.verify() == 0
        self.disturbed = self.disturbed or not (alone or reconciled)
        assert code == 0 or moving or self.disturbed or reconciled, (
            "_SUCCESS exists although the counts do not reconcile"
        )
        return code

    def _require_untouched(
        self,
        world: dict[str, Image],
        labels: Rows,
        rejects: Rows,
        after: dict[str, Rows],
        pruned: bool,
        *,
        retry_all: bool,
    ) -> None:
        """Require that rows of images that have not changed are as they were."""
        for table, before in (("labels", labels), ("rejects", rejects)):
            for name, row in before.items():
                image = world.get(name)
                fresh = (image is not None and image.etag == row["etag"]) or (image is None and not pruned)
                again = table == "rejects" and image is not None and (row["passing"] or retry_all)
                doubled = table == "rejects" and name in labels  # two writers' work, which the next run settles
                if fresh and not (again or doubled):
                    now, notes = dict(after[table].get(name, {})), {self.world.noted().get(name)}
                    if "input_note" in row:
                        notes.add(row["input_note"])
                        assert now.pop("input_note", "gone") in notes, f"{name}: a note that nobody wrote"
                    old = {column: value for column, value in row.items() if column != "input_note"}
                    assert now == old, f"{name}: a row that holds was touched"

    def _require_notes(self, after: dict[str, Rows]) -> None:
        """Require that rows have the notes of the manifest, if their parts have the column and the manifest has rows."""
        if noted := self.world.noted():
            for row in (row for table in after.values() for row in table.items()):
                name, columns = row
                if name in self.world.images and "input_note" in columns:
                    assert columns["input_note"] == noted.get(name), f"{name}: not the note of the manifest"
                    totals["notes held against the manifest"] += 1

    def _require_whole(self, world: dict[str, Image], after: dict[str, Rows], loose: bool, pruned: bool) -> None:
        """Require one row for each listed image, and of the version that was listed unless others were running."""
        labels, rejects = after["labels"], after["rejects"]
        both = labels.keys() & rejects.keys()
        assert not both or loose, f"in both tables: {both}"
        for name, image in world.items():
            found = labels.get(name) or rejects.get(name)
            if found is None and name in self.torn:
                totals["images torn by a second driver"] += 1
                continue
            assert found is not None, f"{name} is lost"
            assert loose or found["etag"] == image.etag or (found["etag"], _outcome_of(found)) in self.known[name]
        if pruned and not loose:
            assert {*labels, *rejects} == world.keys()

    def _rows(self, table: str) -> Rows:
        folder = self.world.folder(table)
        log = Log(folder)
        log.scan()
        found: Rows = {}
        for number in log.numbers:
            data = folder.read(f"part-{number:08d}.parquet")
            for row in pq.read_table(io.BytesIO(data)).to_pylist():
                name = row["uri"].rpartition("/")[2]
                assert name not in found, f"{name} is twice in {table}/"
                found[name] = row
        return found

    def _success(self) -> bytes | None:
        folder = self.world.folder("")
        return folder.read("_SUCCESS") if folder.exists("_SUCCESS") else None

    def _parts(self) -> dict[str, tuple[Any, Any]]:
        """Return the rows and the footer of each part. The nonce says nothing: a fence writes the same rows with another."""
        folders = {table: self.world.folder(table) for table in ("labels", "rejects")}
        return {
            f"{table}/{name}": _without_nonce(folder.read(name))
            for table, folder in folders.items()
            for name in folder.names()
            if name.startswith("part-")
        }


def _without_nonce(part: bytes) -> tuple[Any, Any]:
    table, footer = decode(part, "a part")
    return table.to_pylist(), replace(footer, nonce="")


def _outcome_of(row: Row) -> str:
    return str(row["reason"] if "reason" in row else row["label"])


def _changed(before: Rows, after: Rows) -> Rows:
    return {name: row for name, row in after.items() if before.get(name) != row}


def _expected_codes(listed: list[str], faults: list[Any]) -> set[int]:
    """Return the codes with which a run may fail. Of no image and an unreachable store, it reports what it meets first."""
    return ({2} if not listed else set()) | ({3} if "away" in faults else set())
