"""A world in one process: images in memory, an output whose writes may fail or kill, and the real job.

Everything is the program's own but three things: the Ray operators are a loop over the worker's function that hands blocks
out of order, twice, or never; the network tells a picture's shade of grey; and a process number is a number of ours, so that
a killed driver is one whose number is not among the living.
"""

from __future__ import annotations

import contextlib
import io
import random
import signal
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from imgbatch.commands import classify, verify
from imgbatch.concurrency import process, signals
from imgbatch.config.sections import StorageConfig
from imgbatch.decode import decode
from imgbatch.engine import attempts, placement, session
from imgbatch.engine.dataset import Attempt
from imgbatch.errors import ImgbatchError, Unreachable
from imgbatch.inference import worker as workers
from imgbatch.ledger import candidates, commit_log, listing_pages, owners, run_record
from imgbatch.models import loading
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.models.runtimes.base import Prediction
from imgbatch.pipeline import preflight, run
from imgbatch.storage.stores import Folder, Stores, time
from imgbatch.verification import run as verification_run
from tests.histories.stores import LABELS, STEP, Image, Input, Memory

WRITES = ("create", "put", "replace", "delete")

_SMALL_PAGE, _UNIT = 4, 3
_MODEL = Model(
    name="shades",
    digest="0" * 64,
    labels=LABELS,
    preprocess=Preprocess(height=8, width=8, resize=(8,)),
    network=lambda: None,  # type: ignore[arg-type,return-value]
)


class Killed(BaseException):
    """The driver's process is dead: nothing that it still tries has an effect."""


Point = tuple[str, int]
"""The n-th write (from 1) to a name that holds the text; the n-th replacement of a part where the text is `replace`."""
Fault = str | Callable[[], object]


@dataclass
class Driver:
    """One run of the job, and what happens at its writes."""

    number: int
    faults: dict[Point, Fault]
    reached: Counter[str] = field(default_factory=Counter)
    happened: list[Fault] = field(default_factory=list)
    dead: bool = False
    away: bool = False

    def fault_at(self, verb: str, path: str) -> Fault | None:
        """Count a write; return what is to happen at it."""
        found = None
        for text in {text for text, _ in self.faults}:
            if text in path or (text == verb and "/part-" in path):
                self.reached[text] += 1
                found = found or self.faults.get((text, self.reached[text]))
        self.happened += [found] if found else []
        return found


class _Hooked:
    """The output's store, whose writes go through the world."""

    def __init__(self, store: Any, world: World) -> None:
        self._store, self._world = store, world

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._store, name)
        if name == "path" or not callable(real):
            return real
        return partial(self._world.written if name in WRITES else self._world.asked, real)


class _Stores(Stores):
    """Stores in which `in://` is the world's input, and all else its output, in memory unless the URI says otherwise."""

    world: World

    @contextlib.contextmanager
    def open(self, uri: str) -> Iterator[Any]:
        store, path = self.resolve(uri)
        with store.open(path) as file:
            yield file

    def resolve(self, uri: str, *, via_fsspec: bool = False) -> Any:
        if uri.startswith("in://"):
            return self.world.input, uri.partition("://")[2]
        if uri.startswith("memory://"):
            return _Hooked(self.world.memory, self.world), self.world.memory.path(uri)
        store, path = super().resolve(uri, via_fsspec=via_fsspec)
        return _Hooked(store, self.world), path


class _Shades:
    """A network that knows shades of grey."""

    def __call__(self, pixels: np.ndarray[Any, Any]) -> Prediction:
        best = np.rint(pixels.mean((1, 2, 3)) / STEP).astype(np.int32)
        others = (best[:, None] + np.arange(len(LABELS), dtype=np.int32)) % len(LABELS)
        scores = np.tile(np.linspace(0.7, 0.01, len(LABELS), dtype=np.float32), (len(pixels), 1))
        return Prediction(others, scores)

    def facts(self) -> dict[str, Any]:
        return {}


@dataclass
class World:
    """The images, the output, and all faults between them."""

    output: str = "memory://out"
    environment: dict[str, str] = field(default_factory=dict)
    images: dict[str, Image] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """The notes of a manifest on some of the images."""
    memory: Memory = field(default_factory=Memory)
    late: list[Callable[[], object]] = field(default_factory=list)
    """Writes of dead or timed-out drivers that have not arrived yet."""
    alive: set[int] = field(default_factory=set)
    drivers: list[Driver] = field(default_factory=list)
    """The running drivers: the last one runs within a write of the one before it."""
    ended: Driver = field(default_factory=lambda: Driver(0, {}))
    """The driver that ended last."""
    error: str = ""
    """The error of the last run or `verify` that failed."""
    started: int = 0
    killed: int = 0
    failed: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    lossy: float = 0.0
    """The proportion of units whose results Ray loses or delivers twice."""

    def __post_init__(self) -> None:
        self.input = Input(self.images)

    def stores(self, config: Any) -> Stores:
        """Return the program's view of the world."""
        made = _Stores(config, self.environment)
        made.world = self
        return made

    def folder(self, name: str) -> Folder:
        """Return a folder of the output, as nobody's process sees it."""
        return Folder(self.stores(StorageConfig()), f"{self.output}/{name}" if name else self.output)

    def asked(self, real: Callable[..., Any], *arguments: Any) -> Any:
        """Let a read through, unless its process is gone."""
        if self.drivers and self.drivers[-1].dead:
            raise Killed
        return real(*arguments)

    def written(self, real: Callable[..., Any], *arguments: Any) -> Any:
        """Let a write through, or do what is to happen at it."""
        if not self.drivers:
            return real(*arguments)
        driver = self.drivers[-1]
        if driver.dead:
            raise Killed
        fault = driver.fault_at(real.__name__, arguments[0])
        if callable(fault):
            fault()
        if fault in ("killed before", "killed in flight"):
            self.late += [partial(real, *arguments)] if fault == "killed in flight" else []
            self._kill(driver)
        driver.away = driver.away or fault == "away"
        if driver.away or fault in ("refused", "late"):
            self.late += [partial(real, *arguments)] if fault == "late" else []
            self.failed += 1
            raise Unreachable("by plan")
        result = real(*arguments)
        if fault == "killed after":
            self._kill(driver)
        if fault == "unanswered":
            self.failed += 1
            raise Unreachable("the answer was lost")
        return result

    def _kill(self, driver: Driver) -> None:
        driver.dead = True
        self.alive.discard(driver.number)
        self.killed += 1
        raise Killed

    def run(self, *settings: str, faults: dict[Point, Fault] | None = None, limit: int | None = None) -> int | None:
        """Run the job; return its exit code, None if it was killed."""
        self.started += 1
        driver = Driver(self.started, faults or {})
        given = [
            "run.commit_interval_s=1e-9",
            "storage.retries=3",
            "fetch.concurrency=2",
            "report.enabled=false",
            *settings,
        ]
        inputs = ["in://in"]
        if self.noted():  # one without a row would be refused
            last = limit is not None or self.chance.random() < 0.5  # a limit is to take the first images by name
            inputs.insert(1 if last else 0, f"in://{self.input.manifest}")
        before = self.input.listed, self.input.notes
        self.input.listed, self.input.notes = dict(self.images), self.noted()
        flags = Namespace(
            config=None, settings=given, input=inputs, output=self.output, model="shades", date=None, limit=limit,
            dry_run=False,
        )  # fmt: skip
        self.alive.add(driver.number)
        self.drivers.append(driver)
        try:
            with self._patched(), contextlib.redirect_stdout(io.StringIO()):
                return classify.classify(flags)
        except ImgbatchError as error:
            self.error = str(error)
            return error.exit_code
        except Killed:
            return None
        finally:
            self.input.listed, self.input.notes = before
            self.ended = self.drivers.pop()
            self.alive.discard(driver.number)

    def noted(self) -> dict[str, str]:
        """Return the notes on images that are there."""
        return {name: note for name, note in self.notes.items() if name in self.images}

    def verify(self) -> int:
        """Run `verify`; return the exit code."""
        with self._patched(), contextlib.redirect_stdout(io.StringIO()):
            try:
                return verify.verify(
                    Namespace(
                        config=None, settings=[], output=self.output, sample=None, model=None, seed=None, date=None
                    )
                )
            except ImgbatchError as error:
                return error.exit_code

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        number = self.drivers[-1].number if self.drivers else 0
        with contextlib.ExitStack() as stack:
            for target, name, value in (
                (preflight, "Stores", self.stores),
                (verification_run, "Stores", self.stores),
                (loading, "load", lambda *arguments: _MODEL),
                (candidates, "poll_items", lambda items, stall_s, **options: items),
                (attempts, "poll_items", lambda items, stall_s, **options: items),
                (session, "connected", lambda *arguments: contextlib.nullcontext()),
                (placement, "node_ids", lambda *arguments: set()),
                (placement, "wait_for_plan", lambda config: placement.Plan(False, 1, 1, 1, 0, 1, 0, 1)),
                (run, "label_images", self._label_images),
                (process, "release_memory", lambda: None),
                # The real one would end the process of the tests 25 s later.
                (signals.StopRequest, "receive", lambda stop, signum: None),
                (run_record, "_versions", dict),
                (owners, "this_process", lambda: {"host": "here", "pid": number}),
                (owners, "is_alive", lambda owner: owner["pid"] in self.alive),
                (time, "sleep", lambda seconds: None),
                (commit_log.time, "sleep", lambda seconds: None),
                (listing_pages, "PAGE_ROWS", _SMALL_PAGE),
                (workers, "_decoder", lambda work, isolated: partial(decode, max_pixels=100, short_side=None)),
            ):
                stack.enter_context(mock.patch.object(target, name, value))
            for signum in signals.SIGNALS:  # back in force before the thread that hears signals is the real one again
                stack.callback(signal.signal, signum, signal.getsignal(signum))
            yield

    def _label_images(self, work: Any, attempt: Attempt) -> Iterator[pa.Table]:
        """Do what the operators do, unit by unit, in any order; as Ray may, drop some and do some twice."""
        round, numbers = attempt.round, np.flatnonzero(attempt.work_plan.pending).astype(np.uint32)
        self.chance.shuffle(numbers)
        rows = min(_UNIT, round.rows)
        units = [np.sort(numbers[start : start + rows]) for start in range(0, len(numbers), rows)]
        worker = workers.LabelImages(work, load=lambda work: _Shades())
        for unit in units:
            listed = listing_pages.Pages(work.listing).rows(unit)["uri"].to_pylist()
            images = [self.images.get(uri.rpartition("/")[2]) for uri in listed]
            lost = not round.isolated and self.chance.random() < self.lossy
            if lost or any(image and image.kind == "crashed" and not image.mood for image in images):
                continue
            for _ in range(2 if self.chance.random() < self.lossy else 1):
                yield from worker(pa.table({"index": unit}))
