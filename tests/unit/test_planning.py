"""The parts of `imgbatch plan` that compute: strata, sample, cost model, forecast, prices, deadlines, and the comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.config.deadline import parse
from imgbatch.config.reading import load
from imgbatch.config.sections import StorageConfig
from imgbatch.engine.placement import NodeShape, Plan
from imgbatch.errors import ConfigError, UsageError
from imgbatch.ledger.listing_pages import PAGE_ROWS, PackedPages, Pages
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.pipeline.finish_by import Punctuality, on_late
from imgbatch.pipeline.plan_outcome import PlanOutcome
from imgbatch.planning import admission, forecast, prices
from imgbatch.planning.cost_model import DRAWS, CellCount, Costs, Interval, Timings, estimate, fit, stream_images
from imgbatch.planning.forecast import Cluster, Measurements
from imgbatch.planning.measurement import Measured
from imgbatch.planning.reservoir import Reservoir
from imgbatch.planning.run import check_memory
from imgbatch.planning.sample import draw
from imgbatch.planning.strata import Population, cell_of, name_of, strata_of
from imgbatch.schema import LISTING, PARQUET, TAR
from imgbatch.storage.stores import Folder, Stores

NOTHING = np.zeros(DRAWS + 1)


def listed(uris: Sequence[str], sizes: Sequence[int | None], container: str | None = None) -> pa.RecordBatch:
    """Return a batch of a listing."""
    nulls = [pa.nulls(len(uris), LISTING.field(name).type) for name in ("etag", "last_modified")]
    containers = pa.array([container] * len(uris), pa.string())
    return pa.record_batch([pa.array(uris), pa.array(sizes, pa.int64()), *nulls, containers], schema=LISTING)


def corpus(count: int, seed: int = 0) -> pa.RecordBatch:
    """Return photos of many sizes in five folders; every fourth is a PNG."""
    random = np.random.default_rng(seed)
    uris = [f"s3://b/{n % 5}/{n:06d}.{'png' if n % 4 == 0 else 'JPG'}" for n in range(count)]
    return listed(uris, random.lognormal(11, 1, count).astype(int).tolist())


def test_strata_are_formats_and_sizes_of_names() -> None:
    batch = listed(
        ["a/x.JPG", "a/x.jpeg", "a/y.tif", "a/noname", "a/z.unknown", "a/w.png", "a/big.png"],
        [1_000, 15_999, 16_000, 63_000, 10, None, 20_000_000],
    )
    cells = strata_of(batch) // 8
    assert [name_of(cell) for cell in cells.tolist()] == [
        ("jpeg", "below 16 kB"), ("jpeg", "below 16 kB"), ("tiff", "16 to 64 kB"), ("other", "16 to 64 kB"),
        ("other", "below 16 kB"), ("png", "unknown size"), ("png", "16 MB and more"),
    ]  # fmt: skip
    assert name_of(int(strata_of(listed(["a/x.tar"], [5], TAR))[0]) // 8) == ("tar", "below 16 kB")
    assert name_of(int(strata_of(listed(["a/x.parquet#7"], [None], PARQUET))[0]) // 8)[0] == "parquet"


def test_a_population_counts_what_is_pending_apart() -> None:
    batch, population = listed(["a/x.jpg", "a/y.jpg"], [10, 20]), Population()
    population.add(strata_of(batch), batch, np.array([True, False]))
    sums = [int(values.sum()) for values in (population.images, population.pending, population.bytes)]
    assert [*sums, int(population.pending_bytes.sum())] == [2, 1, 30, 10]


def sample_of(batch: pa.RecordBatch, step: int, seed: int = 1, count: int = 200) -> list[str]:
    reservoir = Reservoir(seed)
    for first in range(0, len(batch), step):
        part = batch.slice(first, step)
        reservoir.add(first, part, np.ones(len(part), bool))
    uris: list[str] = draw(reservoir, {}, count).rows["uri"].to_pylist()
    return uris


def test_a_sample_depends_on_the_seed_and_not_on_how_the_listing_is_cut() -> None:
    batch = corpus(20_000)
    first = sample_of(batch, 20_000)
    assert sample_of(batch, 777) == first and len(set(first)) == len(first) and 180 <= len(first) <= 260
    assert sample_of(batch, 20_000, seed=2) != first
    assert first != sorted(first), "a measurement that ends early has a random part"


def test_a_sample_has_each_format_size_and_folder_and_nothing_that_is_done() -> None:
    batch, reservoir = corpus(20_000), Reservoir(0)
    pending = np.arange(len(batch)) % 2 == 1
    reservoir.add(0, batch, pending)
    sample = draw(reservoir, {}, 300)
    numbers = {int(uri.rpartition("/")[2].partition(".")[0]) for uri in sample.rows["uri"].to_pylist()}
    assert all(number % 2 for number in numbers)
    counts = reservoir.population.by_cell(reservoir.population.pending)
    sampled = np.bincount(sample.cells, minlength=len(counts))
    assert (sampled[counts >= 6] >= 6).all() and (sampled <= counts).all()
    assert {uri.split("/")[3] for uri in sample.rows["uri"].to_pylist()} == {"0", "1", "2", "3", "4"}


def test_a_listing_without_pending_images_has_an_empty_sample() -> None:
    reservoir = Reservoir(0)
    assert len(draw(reservoir, {}, 10)) == 0
    reservoir.add(0, corpus(100), np.zeros(100, bool))
    assert len(draw(reservoir, {}, 10)) == 0 and reservoir.population.images.sum() == 100


def test_the_reservoir_does_not_grow_with_the_listing() -> None:
    reservoir = Reservoir(0)
    for part in range(40):
        uris = [f"s3://b/{part}/{n % 50}/{n}.jpg" for n in range(5_000)]
        reservoir.add(part * 5_000, listed(uris, [90_000] * 5_000), np.ones(5_000, bool))
    assert len(reservoir.images()[0]) <= 8 * 1_024  # one format and size, eight groups of folders


def test_streams_and_row_groups_are_sampled_as_a_whole() -> None:
    reservoir = Reservoir(0)
    reservoir.add(0, listed([f"s3://b/{n}.tar" for n in range(30)], [1_000_000] * 30, TAR), np.ones(30, bool))
    for group in range(20):
        uris = [f"s3://b/t.parquet#{group * 10 + row}" for row in range(10)]
        reservoir.add(30 + 10 * group, listed(uris, [None] * 10, PARQUET), np.ones(10, bool))
    streams: Any = dict.fromkeys(range(30), SimpleNamespace(position=(0, -1)))
    sample = draw(reservoir, streams, 100)
    assert len(sample.streams) == 8 and sum(sample.stream_bytes) == 30_000_000
    assert sample.ranges.tolist() == [[10 * n, 10 * n + 10] for n in range(8)]
    for first, end in sample.ranges.tolist():
        rows = [int(uri.partition("#")[2]) for uri in sample.rows["uri"][first:end].to_pylist()]
        assert rows == list(range(rows[0], rows[0] + 10))
    assert set(sample.work_plan(85).streams) == {85, 86, 87}


def test_only_the_rest_of_a_tar_that_was_read_in_part_is_planned() -> None:
    reservoir = Reservoir(0)
    reservoir.add(0, listed(["s3://b/0.tar", "s3://b/1.tar"], [1_000, 2_000], TAR), np.ones(2, bool))
    streams: Any = {0: SimpleNamespace(position=(512, 700)), 1: SimpleNamespace(position=(0, -1))}
    assert draw(reservoir, streams, 10).stream_bytes == [300, 2_000]


def test_packed_pages_are_read_like_those_in_a_store() -> None:
    rows = pa.Table.from_batches([corpus(PAGE_ROWS + 5)])
    packed = PackedPages.of("plan", rows)
    taken = Pages(packed).rows(np.array([3, PAGE_ROWS + 2]))
    assert taken["uri"].to_pylist() == rows["uri"].take(pa.array([3, PAGE_ROWS + 2])).to_pylist()
    assert "s3://" not in repr(packed)


def measured(cells: Any, bytes_: Any, pixels: Any, seconds: Any, forward: float = 0.005) -> Timings:
    """Return timings with batches of 64 images."""
    random = np.random.default_rng(0)
    batches = np.stack([64 * forward * random.lognormal(0, 0.1, 15), np.full(15, 64.0)], axis=1)
    return Timings(cells, bytes_, pixels, seconds, batches * [0.1, 1], batches, batches * [0.05, 1])


def test_intervals_cover_the_true_cost_about_as_often_as_they_say() -> None:
    inside, widths, errors = 0, [], []
    for seed in range(60):
        random = np.random.default_rng(seed)
        count = 4_000
        sizes = random.lognormal(11.5, 0.8, count)
        pixels = sizes * random.uniform(4, 14, count)
        seconds = (2e-4 + 9e-9 * sizes + 1.3e-9 * pixels) * random.lognormal(0, 0.3, count)
        cells = np.array([cell_of("jpeg", int(size)) for size in sizes])
        drawn = random.choice(count, 400, replace=False)
        counts = [
            CellCount(int(cell), np.full(DRAWS + 1, float((cells == cell).sum())), float(sizes[cells == cell].sum()))
            for cell in np.unique(cells)
        ]
        costs = estimate(measured(cells[drawn], sizes[drawn], pixels[drawn], seconds[drawn]), counts, seed)
        interval, truth = Interval.of(costs.prepare_s), seconds.sum()
        inside += interval.low <= truth <= interval.high
        widths.append((interval.high - interval.low) / 2 / truth)
        errors.append(costs.prepare_s[0] / truth - 1)
    assert inside >= 0.75 * 60, inside
    assert np.mean(widths) < 0.06 and abs(np.mean(errors)) < 0.02


def test_bytes_and_pixels_explain_the_cost_of_images_that_are_larger_than_the_sample() -> None:
    """The listing says how large the images are that were not drawn."""
    random = np.random.default_rng(0)
    sizes = random.uniform(50_000, 60_000, 200)
    pixels, seconds = sizes * 8, 1e-4 + 2e-8 * sizes
    cells = np.full(200, cell_of("jpeg", 50_000))
    count = CellCount(int(cells[0]), np.full(DRAWS + 1, 1_000.0), 64e6)  # 64 kB each
    costs = estimate(measured(cells, sizes, pixels, seconds), [count])
    assert costs.prepare_s[0] == pytest.approx(1_000 * (1e-4 + 2e-8 * 64_000), rel=0.02)


def test_no_coefficient_is_negative_and_a_few_images_give_their_mean() -> None:
    random = np.random.default_rng(0)
    sizes, pixels = random.uniform(1e4, 1e5, 50), random.uniform(1e5, 1e6, 50)
    line = fit(sizes, pixels, 5e-3 - 2e-8 * sizes + 1e-9 * pixels)
    assert line.per_byte == 0 and line.per_pixel > 0 and line.fixed > 0
    assert fit(sizes[:5], pixels[:5], np.full(5, 3e-3)).of(10.0, 1e9, 1e9) == pytest.approx(0.03)


def test_the_number_of_images_in_tars_comes_from_the_bytes_that_were_read() -> None:
    draws = stream_images([(1_000_000, 100), (900_000, 110)], 19_000_000, np.random.default_rng(0))
    assert draws[0] == pytest.approx(2_100) and Interval.of(draws).low < 2_100 < Interval.of(draws).high
    assert not stream_images([], 5.0, np.random.default_rng(0)).any()


def costs_of(images: float, prepare: float, wait: float, forward: float, gap: float = 0.0) -> Costs:
    """Return costs in seconds of one image, without uncertainty."""
    one = np.ones(DRAWS + 1)
    return Costs(one * images * prepare, one * wait, one * forward, one * gap, one * images)


ONE_NODE = Cluster(split=False, nodes=1, cpus=4, gpus=0, actors=4)
PHASES = Measurements(connect_s=3.0, first_row_s=(6.0, 4.0), listing_s=1.0, shutdown_s=1.0, listed=100_000)


def test_the_work_is_divided_among_the_actors_and_other_phases_are_not() -> None:
    costs = costs_of(100_000, 0.002, 0.0, 0.005, 0.001)
    here = forecast.forecast(costs, ONE_NODE, PHASES)
    assert here.seconds["work"][0] == pytest.approx(100_000 * 0.008 / 4)
    twice = forecast.forecast(costs, ONE_NODE.scaled(2), PHASES)
    assert twice.seconds["work"][0] == pytest.approx(here.seconds["work"][0] / 2)
    assert (twice.seconds["start"] == here.seconds["start"]).all()
    start = Interval.of(here.seconds["start"])
    assert start.low < 7 and start.high > 9  # both passes over the sample lie inside
    assert ONE_NODE.scaled(5).actors == 20
    assert Cluster(False, 1, 4, 0, 4, max_actors=6).scaled(5).actors == 6


def test_with_gpus_the_slower_operator_decides() -> None:
    cluster = Cluster(split=True, nodes=1, cpus=8, gpus=1, actors=1)
    slow_cpus = costs_of(80_000, 0.004, 0.0, 0.0002)
    seconds = forecast.forecast(slow_cpus, cluster, PHASES).seconds["work"]
    assert Interval.of(seconds).low > 80_000 * 0.004 / 8 and forecast.bottleneck(slow_cpus, cluster).stage == "decode"
    assert (
        "20.0 cores to be busy, and has 8.0: the GPUs are idle for 60%"
        in forecast.bottleneck(slow_cpus, cluster).remedy
    )
    slow_gpu = costs_of(80_000, 0.001, 0.0, 0.001)
    assert forecast.bottleneck(slow_gpu, cluster).stage == "classify"


@pytest.mark.parametrize(
    ("costs", "stage"),
    [
        (costs_of(9, 0.002, 0.001, 0.005), "classify"),
        (costs_of(9, 0.020, 0.001, 0.005), "decode"),
        (costs_of(9, 0.002, 0.030, 0.005), "fetch"),
        (costs_of(9, 0.002, 0.001, 0.005, 0.01), "idle"),
    ],
)
def test_the_bottleneck_on_cpus_is_the_longest_stage(costs: Costs, stage: str) -> None:
    assert forecast.bottleneck(costs, ONE_NODE).stage == stage


def test_as_many_nodes_as_a_deadline_takes_and_not_one_more() -> None:
    costs = costs_of(10_000_000, 0.002, 0.0, 0.005)
    nodes = forecast.nodes_for(costs, ONE_NODE, PHASES, 3_600)
    assert nodes is not None and nodes > 4

    def latest(count: int) -> float:
        return float(np.quantile(forecast.forecast(costs, ONE_NODE.scaled(count), PHASES).total, 0.95))

    assert latest(nodes) <= 3_600 < latest(nodes - 1)
    assert forecast.nodes_for(costs, ONE_NODE, PHASES, 5.0) is None  # the start alone takes longer


def test_no_more_workers_read_than_there_are_tars() -> None:
    assert forecast.imbalance([10.0] * 4, actors=8) == 2
    assert forecast.imbalance([10.0] * 800, actors=8) == 1


CATALOGUE = """\
InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Price,SpotPrice,Region,AvailabilityZone
c7i.2xlarge,8.0,16.0,,,,0.357,0.12,us-east-1,us-east-1a
m7i.2xlarge,8.0,32.0,,,,0.4032,,us-east-1,us-east-1a
g6.2xlarge,8.0,32.0,L4,1.0,"{}",0.9776,0.41,us-east-1,us-east-1b
g5.2xlarge,8.0,32.0,A10G,1.0,"{}",1.212,,us-east-1,us-east-1b
old.2xlarge,8.0,32.0,,,,,,us-east-1,us-east-1b
"""


@pytest.fixture
def catalogue(tmp_path: Path) -> str:
    """A file of prices."""
    (tmp_path / "vms.csv").write_text(CATALOGUE)
    return str(tmp_path / "vms.csv")


STORES = Stores(StorageConfig(), {})


def test_prices_are_those_of_machines_like_the_nodes(catalogue: str) -> None:
    found = prices.read(catalogue, STORES)
    assert len(found.prices) == 4  # a row without a price says nothing

    def named(*node: Any) -> list[str]:
        return [price.machine for price in found.like(*node).prices]

    assert named(8, 0, None, 15.0) == ["c7i.2xlarge", "m7i.2xlarge"]
    assert named(8, 0, None, 30.0) == ["m7i.2xlarge"]
    assert named(8, 1, "L4", 30.0) == ["g6.2xlarge"]
    assert named(8, 1, None, 30.0) == ["g6.2xlarge", "g5.2xlarge"]
    (price,) = found.of_machine("g5.2xlarge").prices
    assert price.on_demand == 1.212 and price.spot is None and price.region == "us-east-1b"


def test_a_file_of_prices_without_the_machine_is_refused(catalogue: str) -> None:
    found = prices.read(catalogue, STORES)
    with pytest.raises(UsageError, match=r"no machine 'g6\.4xlarge'; did you mean 'g6\.2xlarge'"):
        found.of_machine("g6.4xlarge")
    with pytest.raises(UsageError, match=r"with 64 vCPUs and 256 GB of memory and 8 H100; it has c7i.*--machine"):
        found.like(64, 8, "H100", 256.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("InstanceType,Price\na,1\n", "has no column vCPUs"),
        ("InstanceType,vCPUs\na,1\n", "has no column Price or SpotPrice"),
        ("InstanceType,vCPUs,Price\na,1,cheap\n", "line 2: Price is 'cheap'"),
        ("InstanceType,vCPUs,Price\na,1,nan\n", "line 2: Price is 'nan'"),
        ("", "has no column InstanceType and vCPUs"),
    ],
)
def test_a_file_that_has_no_prices_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(UsageError, match=message):
        prices.read(str(tmp_path / "p.csv"), STORES)


def test_a_signature_in_the_uri_of_prices_is_not_shown(catalogue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, meta = STORES.read(catalogue)
    monkeypatch.setattr(Stores, "read", lambda self, uri, limit: (content, meta))
    found = prices.read("https://host/vms.csv?X-Amz-Signature=secret", STORES)
    assert "secret" not in found.uri and found.modified is not None
    with pytest.raises(UsageError) as refused:
        found.of_machine("none")
    assert "host/vms.csv" in str(refused.value) and "secret" not in str(refused.value)


def test_a_missing_file_of_prices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--prices .*none\.csv"):
        prices.read(str(tmp_path / "none.csv"), STORES)


EVENING = datetime(2026, 11, 28, 22, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "day", "expected"),
    [
        ("06:00", None, "2026-11-29T06:00"),  # the next time it is six
        ("23:30", None, "2026-11-28T23:30"),
        ("06:00@Europe/Berlin", None, "2026-11-29T05:00"),
        ("06:00@Asia/Tokyo", None, "2026-11-29T21:00"),  # it is 07:00 there now
        ("06:00", "2026-11-28", "2026-11-28T06:00"),  # of the date of the run, even if that has passed
        ("06:00+1", "2026-11-28", "2026-11-29T06:00"),
        ("02:30@Europe/Berlin", "2026-03-29", "2026-03-29T01:30"),  # a time that the clock skips
        ("2026-12-01T06:00+02:00", "2026-11-28", "2026-12-01T04:00"),
        ("2026-12-01T06:00", None, "2026-12-01T06:00"),
    ],
)
def test_a_deadline_is_a_time_of_the_date_of_the_run(text: str, day: str | None, expected: str) -> None:
    assert parse(text, "run.finish_by").at(EVENING, day).isoformat() == f"{expected}:00+00:00"


@pytest.mark.parametrize(
    "text", ["6:00", "25:00", "06:00@Mars/Base", "06:00@", "2026-11-29", "2026-13-01T06:00", "soon", ""]
)
def test_what_is_no_time_is_refused_before_any_work(text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.finish_by="):
        load(None, [f"run.finish_by={json.dumps(text)}"])


def test_a_date_ties_the_deadline_so_that_a_repeated_run_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(None, ["run.finish_by=06:00"], date="2026-11-28").run.finish_by == "2026-11-28T06:00:00+00:00"
    monkeypatch.setenv("IMGBATCH_DATE", "2026-11-27")
    assert load(None, ["run.finish_by=06:00+1"]).run.finish_by == "2026-11-28T06:00:00+00:00"
    monkeypatch.delenv("IMGBATCH_DATE")
    assert load(None, ["run.finish_by=06:00"]).run.finish_by == "06:00"


class Night:
    """A clock for both kinds of time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, finish_by: str | None, total: float | None) -> Punctuality:
        """Return a watch of a run that started at 22:00."""
        moment = None if finish_by is None else datetime.fromisoformat(finish_by).replace(tzinfo=UTC)
        return Punctuality(
            moment, {}, total, clock=lambda: self.seconds,
            now=lambda: datetime.fromtimestamp(EVENING.timestamp() + self.seconds, UTC),
        )  # fmt: skip


def test_a_run_that_will_be_late_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    night, calls = Night(), []
    watch = night.watch("2026-11-28T23:00", total=10_000)
    with on_late(calls.append):
        for minute in range(1, 30):
            night.seconds = 60.0 * minute
            watch.check(done=100 * minute)  # 100 a minute: 100 minutes
    late = watch.facts["late"]
    assert calls == [late] and len(caplog.records) == 1
    assert late["finish_by"] == "2026-11-28T23:00:00+00:00" and late["forecast"].startswith("2026-11-28T23:4")
    assert "will be late: at 2 images/s it ends at 2026-11-28 23:4" in caplog.text


def test_a_run_that_is_in_time_or_has_no_deadline_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for finish_by in ("2026-11-28T23:45", None):
        night = Night()
        watch = night.watch(finish_by, total=10_000)
        for minute in range(1, 100):
            night.seconds = 60.0 * minute
            watch.check(done=100 * minute)
        assert watch.facts == {} and not watch.should_grow()
    assert not caplog.records


def test_without_a_total_only_the_deadline_itself_counts() -> None:
    night = Night()
    watch = night.watch("2026-11-28T22:10", total=None)
    night.seconds = 500.0
    watch.check(done=10)
    assert not watch.is_late
    night.seconds = 601.0
    watch.check(done=11)
    assert watch.facts["late"]["forecast"] is None


def test_a_late_run_looks_for_nodes_every_half_minute_and_survives_a_failing_hook() -> None:
    night = Night()
    watch = night.watch("2026-11-28T21:00", total=10)

    def fail(late: dict[str, Any]) -> None:
        raise RuntimeError("no network")

    night.seconds = 40.0
    with on_late(fail):
        watch.check(done=0)
    assert watch.is_late and watch.should_grow() and not watch.should_grow()
    night.seconds += 31
    assert watch.should_grow()


def test_the_checks_leave_no_object_behind(tmp_path: Path) -> None:
    output = Folder(STORES, str(tmp_path / "out"))
    checks = admission.check_output(output)
    assert [(check.name, check.passed) for check in checks] == [
        ("write", True), ("conditional creation", True), ("delete", True),
    ]  # fmt: skip
    assert output.names() == []


def test_an_output_that_cannot_be_written_is_one_failed_check(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (check,) = admission.check_output(Folder(STORES, str(tmp_path / "file" / "out")))
    assert check.passed is False and "cannot be written" in check.text


@pytest.mark.parametrize(("memory", "passed"), [(8e9, True), (3e9, False), (0.0, None)])
def test_the_memory_of_the_workers_is_compared_with_the_fullest_node(memory: float, passed: bool | None) -> None:
    check = admission.check_memory(10**9, [(4e9, memory), (8e9, 64e9)] if memory else [])
    assert check.passed is passed


def test_a_decoder_takes_less_memory_than_an_actor_on_a_gpu() -> None:
    """On a node with GPUs, actors and decoders are added up; a node without a GPU has decoders alone."""
    shapes = [NodeShape(8, 1, 10e9, "L4"), NodeShape(32, 0, 20e9, None)]
    notes = [{"memory": 6_000_000_000}], [{"memory": 400_000_000}, {"memory": 500_000_000}]
    measured = Measured(WorkPlan(np.zeros(0, bool), np.zeros((0, 2), np.int64), {}), frozenset())
    measured.classified, measured.prepared = notes
    plan = Plan(True, 1, 1, 1, gpus_per_actor=1.0, cpus=40, gpus=1, nodes=2)
    check = check_memory(plan, shapes, measured)
    assert check.passed is False and "all workers of a node 10.0 GB of 10.0 GB" in check.text
    assert check_memory(plan, [NodeShape(8, 1, 16e9, "L4"), shapes[1]], measured).passed


def plan_of(rows: int = 100, **fingerprint: Any) -> dict[str, Any]:
    """Return the part of a plan that a run reads."""

    def of(actors: int, mid: float) -> dict[str, Any]:
        return {"actors": actors, "seconds": {"total": {"low": 0.8 * mid, "mid": mid, "high": 1.2 * mid}}}

    images = {"rows": rows, "to_label": {"low": rows, "mid": rows, "high": rows}}
    return {
        "id": "plan-1", "fingerprint": {"weights": "a", **fingerprint}, "images": images, "forecast": of(8, 25.0),
        "forecast_here": of(2, 100.0),
    }  # fmt: skip


def outcome(tmp_path: Path, plan: object, rows: int = 100) -> PlanOutcome | None:
    output = Folder(STORES, str(tmp_path))
    output.put("runs/plan.json", json.dumps(plan).encode())
    return PlanOutcome.read(output, {"weights": "a"}, rows)


@pytest.mark.parametrize(
    ("seconds", "actors", "inside", "deviation"),
    [(110.0, 2, True, 0.1), (130.0, 2, False, 0.3), (25.0, 8, True, 0.0), (15.0, 8, False, -0.4)],
)
def test_a_run_is_compared_with_the_forecast_for_its_actors(
    seconds: float, actors: int, inside: bool, deviation: float, tmp_path: Path
) -> None:
    planned = outcome(tmp_path, plan_of())
    assert planned is not None and planned.images == 100
    facts = planned.compare(seconds, actors)
    assert (facts["inside"], facts["deviation"], facts["actual_s"]) == (inside, deviation, seconds)


@pytest.mark.parametrize(
    ("plan", "rows", "actors", "reason"),
    [
        (plan_of(weights="b"), 100, 2, "another model"),
        (plan_of(rows=50), 100, 2, "made for 50 pending images or tars, this run has 100"),
        (plan_of(), 100, 3, "made for 2 or 8 actors, this run has 3"),
    ],
)
def test_a_plan_for_something_else_is_not_compared(
    plan: dict[str, Any], rows: int, actors: int, reason: str, tmp_path: Path
) -> None:
    planned = outcome(tmp_path, plan, rows)
    assert planned is not None
    facts = planned.compare(100.0, actors)
    assert reason in facts["not_compared"] and "inside" not in facts


@pytest.mark.parametrize("plan", [[], {}, {"images": {"rows": "many"}}, {"images": {"rows": 3}, "forecast": 7}])
def test_a_damaged_plan_is_none(plan: object, tmp_path: Path) -> None:
    assert outcome(tmp_path, plan, 3) is None
    assert PlanOutcome.read(Folder(STORES, str(tmp_path / "empty")), {}, 3) is None
