"""Histories of tars: they are added, replaced, truncated and deleted between runs that are limited, killed, or lose rows.

Parts of the output are lost, damaged and copied in between, and what the messages advise is done.
"""

from __future__ import annotations

import gzip
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.errors import AuditError, OutputError
from imgbatch.storage.local import LocalStore
from tests.unit.test_repair import move_away
from tests.unit.test_tars import COLOURS, Entry, Killed, Run, packed, picture

_WRITES = ("create", "put", "replace", "delete")


class History:
    """Tars and their members; the tables of a successful run must agree with them."""

    def __init__(self, place: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.run = Run(place)
        self.members: dict[str, dict[str, int | None]] = {}
        """By tar: the number of each member's picture, None for one that is no picture."""
        self.entries: dict[str, list[Entry]] = {}
        """By tar: its members in their order, with second ones of some names."""
        self.torn: set[str] = set()
        self.done: list[str] = []

    def write(self) -> None:
        """Write a tar, new or over an old one, of old members, changed ones and new ones."""
        name = f"{self.draw.choice('abc')}.tar{self.draw.choice(('', '.gz'))}"
        some = {name: value for name, value in self.members.get(name, {}).items() if self.draw.random() < 0.7}
        for number in self.draw.sample(range(40), self.draw.randint(1, 12)):
            some[f"{number:04d}.png"] = None if self.draw.random() < 0.15 else self.draw.randrange(3)
        entries = [(member, b"no image" if value is None else picture(value)) for member, value in some.items()]
        for _ in range(self.draw.choice((0, 0, 1, 2, 4))):
            at = self.draw.randrange(len(entries))
            entries.insert(self.draw.randint(at + 1, len(entries)), (entries[at][0], picture(self.draw.randrange(3))))
        self.members[name], self.entries[name] = some, entries
        self.torn.discard(name)
        self._put(name)

    def tear(self) -> None:
        """Cut a tar off in its middle; it stays so until it is mended."""
        if whole := sorted(name for name in self.members if not name.endswith("gz")):
            name = self.draw.choice(whole)
            data = (self.run.input / name).read_bytes()
            self.run.put(name, data[: self.draw.randrange(1, len(data))])
            self.torn.add(name)

    def mend(self) -> None:
        """Write what is torn anew."""
        for name in sorted(self.torn):
            self._put(name)
        self.torn.clear()

    def delete(self) -> None:
        """Delete a tar."""
        if self.members:
            name = self.draw.choice(sorted(self.members))
            (self.run.input / name).unlink()
            del self.members[name]
            self.torn.discard(name)

    def lose_part(self) -> None:
        """Remove a part, as somebody may who cleans up."""
        if some := self._parts():
            self.draw.choice(some).unlink()

    def damage_part(self) -> None:
        """Cut a part off; the next run names it, and it is moved away as the message says."""
        if some := self._parts():
            file = self.draw.choice(some)
            file.write_bytes(file.read_bytes()[: self.draw.randrange(100)])
            self._follow(OutputError)

    def copy_part(self) -> None:
        """Copy a part to a number that is free, or to one that is lost; one of the two is moved away as the message says."""
        if some := self._parts():
            file = self.draw.choice(some)
            if pq.read_metadata(file).num_rows and self.members:
                last = max(int(other.stem[-8:]) for other in file.parent.glob("part-*"))
                number = self.draw.choice([last + 1, last + 3, self.draw.randint(1, last)])
                copy = file.parent / f"part-{number:08d}.parquet"
                if copy != file:
                    copy.write_bytes(file.read_bytes())
                    self._follow(AuditError)

    def lose_table(self) -> None:
        """Remove a whole table."""
        shutil.rmtree(Path(self.run.output.uri) / self.draw.choice(("labels", "rejects")), ignore_errors=True)

    def _parts(self) -> list[Path]:
        return sorted(Path(self.run.output.uri).glob("*/part-*.parquet"))

    def _follow(self, error: type[Exception]) -> None:
        """Run, and do what the error says."""
        if self.members:
            with pytest.raises(error) as caught:
                self.run()
            assert move_away(str(caught.value)) == 1, self.done
        else:  # nothing to run over
            for file in self._parts():
                file.unlink()

    def whole_run(self, *, prune: bool | None = None) -> None:
        """Run to the end, over blocks that come in whatever order, again, or at first not at all."""
        if not self.members:
            return
        prune = self.draw.random() < 0.3 if prune is None else prune
        self.run(self._unsound, rounds=4, prune=prune)
        self.check(exactly=prune)

    def limited_run(self) -> None:
        """Run up to a limit, which may be less than what is there."""
        if self.members:
            self.run(limit=self.draw.randint(1, 30), reject_lost=True)

    def killed_run(self) -> None:
        """Kill a run before or after one of its writes."""
        at, before, count = self.draw.randrange(12), self.draw.random() < 0.5, iter(range(10**6))

        def dying(real: Any) -> Any:
            def write(store: LocalStore, *given: Any) -> None:
                last = next(count) == at
                if last and before:
                    raise Killed
                real(store, *given)
                if last:
                    raise Killed

            return write

        with pytest.MonkeyPatch.context() as patch:
            for name in _WRITES:
                patch.setattr(LocalStore, name, dying(getattr(LocalStore, name)))
            with suppress(Killed):
                self.run(prune=self.draw.random() < 0.3)

    def run_that_loses(self) -> None:
        """Run where some blocks never come; what is left of their tars is given up until the next run."""
        self.run(lambda blocks: [block for block in blocks if self.draw.random() < 0.8], reject_lost=True)

    def check(self, *, exactly: bool) -> None:
        """Hold both tables against what there is."""
        labels, rejects = {}, {}
        for tar, members in self.members.items():
            if tar not in self.torn:
                labels |= {f"{tar}#{name}": COLOURS[value] for name, value in members.items() if value is not None}
                rejects |= {f"{tar}#{name}": "not_an_image" for name, value in members.items() if value is None}
        found, refused = self.run.rows(), self.run.rows("rejects")
        seconds = {name: refused.pop(name) for name in list(refused) if refused[name] == "duplicate"}
        for tar in self.members.keys() - self.torn:
            many, mine = (
                len(self.entries[tar]) - len(self.members[tar]),
                [name for name in seconds if name.startswith(f"{tar}#")],
            )
            assert len(mine) == many if exactly else len(mine) >= many, self.done
        assert not found.keys() & refused.keys(), self.done
        assert found.items() >= labels.items() and refused.items() >= rejects.items(), self.done
        if exactly and not self.torn:
            assert found == labels and refused == rejects, self.done

    def _put(self, name: str) -> None:
        data = packed(*self.entries[name])
        self.run.put(name, gzip.compress(data) if name.endswith("gz") else data)

    def _unsound(self, blocks: Iterator[pa.Table]) -> list[pa.Table]:
        found = list(blocks)
        kind = self.draw.randrange(4)
        if kind == 1:
            self.draw.shuffle(found)
        if kind == 2:
            found = [block for block in found if self.draw.random() < 0.9]
        return found + found[:1] if kind == 3 else found


def play(place: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.inference.worker._AT_ONCE", 4)
    history = History(place, seed)
    steps = [history.write] * 3 + [history.killed_run] * 3 + [history.limited_run] * 2
    steps += [history.lose_part, history.damage_part, history.copy_part, history.lose_table]
    steps += [history.whole_run, history.whole_run, history.run_that_loses, history.tear, history.mend, history.delete]
    for _ in range(14):
        step = history.draw.choice(steps)
        history.done.append(step.__name__)
        step()
    history.mend()
    history.write()
    for prune in (False, True):
        history.run(prune=prune)
        history.check(exactly=prune)


@pytest.mark.parametrize("seed", range(4))
def test_a_few_histories_of_tars(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    play(tmp_path, seed, monkeypatch)


@pytest.mark.long
def test_hundreds_of_histories_of_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4, 304):
        try:
            play(tmp_path / str(seed), seed, monkeypatch)
        except BaseException as error:
            raise AssertionError(f"history {seed}") from error
