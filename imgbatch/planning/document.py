"""Values: the plan as a document: what `imgbatch plan --json` prints, and `runs/plan.json` has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from imgbatch.config.secrets import masked
from imgbatch.planning import forecast as forecasts
from imgbatch.planning.cost_model import (
    DRAWS,
    CellCount,
    Costs,
    Interval,
    Timings,
    estimate,
    lines,
    stream_images,
)
from imgbatch.planning.forecast import Cluster, Forecast, Measurements
from imgbatch.planning.strata import FORMATS, SIZES, cell_of, name_of
from imgbatch.planning.timings import timings_of
from imgbatch.schema import PARQUET, TAR

if TYPE_CHECKING:
    from imgbatch.ledger.listing import Counts
    from imgbatch.pipeline.preflight import Job
    from imgbatch.planning.admission import Check
    from imgbatch.planning.measurement import Measured
    from imgbatch.planning.prices import Catalogue, Price
    from imgbatch.planning.reservoir import Reservoir
    from imgbatch.planning.sample import Sample

FORMAT_VERSION = 1
_MAX_PRICES = 8
_STAMP = "%Y%m%dT%H%M%SZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Everything that was found out for a plan."""

    job: Job
    started: datetime
    finish_by: datetime | None
    nodes: int | None
    """The number of nodes to plan for; None: those that the cluster has."""
    counts: Counts
    reservoir: Reservoir
    sample: Sample
    measured: Measured | None
    """None: no image is pending."""
    cold_start_s: float | None
    cluster: Cluster
    prices: list[Price]
    price_file: Catalogue | None
    checks: list[Check]
    seconds: Mapping[str, float]

    @property
    def measurements(self) -> Measurements:
        """The seconds of the phases that do not depend on the number of images to label."""
        first_row_s = (self.measured.first_row_s if self.measured is not None else None) or 0.0
        connect_s = self.seconds["connect"] + self.seconds["resources"]
        first_rows = (self.cold_start_s or first_row_s, first_row_s)
        return Measurements(
            connect_s, first_rows, self.seconds["listing"], self.seconds["shutdown"], self.counts.listed
        )

    @property
    def streams(self) -> Sequence[float]:
        """The sizes of the streams, if all images are in streams."""
        population = self.reservoir.population
        outside = population.pending.sum() - len(self.sample.stream_bytes)
        return self.sample.stream_bytes if not outside else ()


def compose(planned: Planned) -> dict[str, Any]:
    """Return the document."""
    job, counts = planned.job, planned.counts
    timings = None
    if planned.measured is not None:
        timings = timings_of(planned.measured, planned.sample, split=planned.cluster.split)
    cells = cell_counts(planned)
    costs = estimate(timings, cells) if timings is not None else _no_costs()
    here = forecasts.forecast(costs, planned.cluster, planned.measurements, planned.streams)
    chosen = here
    if planned.nodes is not None:
        cluster = planned.cluster.scaled(planned.nodes)
        chosen = forecasts.forecast(costs, cluster, planned.measurements, planned.streams)
    bottleneck = forecasts.bottleneck(costs, chosen.cluster) if costs.images.any() else None
    return {
        "format_version": FORMAT_VERSION,
        "id": f"plan-{planned.started.strftime(_STAMP)}",
        "created": planned.started.isoformat(timespec="seconds"),
        "input": [masked(source.uri) for source in job.sources],
        "output": masked(job.output.uri),
        "model": job.model.reference,
        "fingerprint": job.ledger.fingerprint,
        "images": {
            "listed": counts.listed,
            "already_done": counts.already_done,
            "to_label": Interval.of(costs.images).public(),
            "bytes": counts.bytes,
            "streams": counts.streams,
            "rows": int(planned.reservoir.population.pending.sum()),
            "ignored": counts.ignored,
            "duplicates": counts.duplicates,
        },
        "contents": list(_contents(planned, cells, timings)),
        "sample": _sample(planned),
        "measured_s": _measured_seconds(planned),
        "cluster": {name: getattr(planned.cluster, name) for name in ("nodes", "cpus", "gpus", "actors")},
        "per_image": _per_image(costs, timings, planned),
        "lines": _lines(timings),
        "forecast": chosen.public(),
        "forecast_here": here.public(),
        "bottleneck": None if bottleneck is None else {
            "stage": bottleneck.stage, "share": round(bottleneck.share, 3), "remedy": bottleneck.remedy,
        },
        "finish_by": _finish_by(planned, costs, chosen),
        "prices": list(_prices(planned, chosen)),
        "price_file": _price_file(planned.price_file),
        "checks": [check.public() for check in planned.checks],
    }  # fmt: skip


def cell_counts(planned: Planned) -> list[CellCount]:
    """Return the number of images and bytes of each cell that will be labelled; those of all streams are one cell."""
    population = planned.reservoir.population
    images, sizes = population.by_cell(population.pending), population.by_cell(population.pending_bytes)
    found = []
    for cell in np.flatnonzero(images).tolist():
        format, size = name_of(cell)
        if format in (PARQUET, TAR):
            continue
        is_known = size != SIZES[-1]
        found.append(CellCount(cell, np.full(DRAWS + 1, float(images[cell])), float(sizes[cell]) if is_known else None))
    rows = images.reshape(len(FORMATS), -1).sum(axis=1)[FORMATS.index(PARQUET)]
    if rows:
        found.append(CellCount(cell_of(PARQUET, None), np.full(DRAWS + 1, float(rows)), None))
    if planned.sample.stream_bytes:
        found.append(CellCount(cell_of(TAR, None), _stream_images(planned), None))
    return found


def _stream_images(planned: Planned) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the estimated number of images that are left in streams, from the parts that were read."""
    if planned.measured is None:
        return np.zeros(DRAWS + 1)
    read = []
    for number, part in planned.measured.streams.items():
        size = planned.sample.rows["size"][number].as_py() or 0
        end = size if part["whole"] else min(part["offset"], size or part["offset"])
        read_bytes = end - part["start"]
        if part["images"] and read_bytes > 0:
            # The offset is that of the last image, so one image less lies before it.
            read.append((read_bytes, part["images"] - (not part["whole"])))
    random = np.random.default_rng(planned.reservoir.seed)
    images = stream_images(read, float(sum(planned.sample.stream_bytes)), random)
    limit = planned.job.config.limit
    return images if limit is None else np.minimum(images, max(0, limit - planned.counts.listed))


def _contents(planned: Planned, cells: list[CellCount], timings: Timings | None) -> Iterator[dict[str, Any]]:
    """Yield a row for each format and size: images and bytes, what is labelled already, and what the sample had of it."""
    population = planned.reservoir.population
    columns = (population.images, population.bytes, population.pending, population.pending_bytes)
    images, sizes, pending, pending_sizes = (population.by_cell(values) for values in columns)
    estimated = {count.cell // len(SIZES): count.images for count in cells}
    for cell in np.flatnonzero(images).tolist():
        format, size = name_of(cell)
        of_cell = np.zeros(0, bool)
        if timings is not None:
            merged = cell_of(format, None) if format in (PARQUET, TAR) else cell
            of_cell = timings.cells == merged
        row: dict[str, Any] = {
            "format": format,
            "size": size,
            "images": int(images[cell]),
            "bytes": int(sizes[cell]),
            "to_label": int(pending[cell]),
            "bytes_to_label": int(pending_sizes[cell]),
            "sampled": int(of_cell.sum()),
        }
        if of_cell.any() and timings is not None:
            row["megapixels"] = round(float(timings.pixels[of_cell].mean()) / 1e6, 3)
            row["decode_ms"] = round(float(timings.prepare_s[of_cell].mean()) * 1e3, 3)
        if format == TAR and cell // len(SIZES) in estimated:
            row["images_in_tars"] = Interval.of(estimated[cell // len(SIZES)]).public()
        yield row


def _sample(planned: Planned) -> dict[str, Any] | None:
    measured = planned.measured
    if measured is None:
        return None
    formats: dict[str, int] = {}
    for note in measured.prepared:
        for name in note["formats"]:
            formats[name or "no image"] = formats.get(name or "no image", 0) + 1
    return {
        "seed": planned.reservoir.seed,
        "images": measured.arrived,
        "bytes": sum(sum(note["bytes"]) for note in measured.prepared),
        "streams": len(measured.streams),
        "seconds": round(measured.seconds, 2),
        "rejects": dict(measured.reasons),
        "formats": formats,
        "not_reached": measured.lost,
        "left_out": measured.left_out,
        "runtime": measured.facts,
    }


def _measured_seconds(planned: Planned) -> dict[str, float | None]:
    seconds: dict[str, float | None] = {
        **planned.seconds,
        "first_row_of_warm_up": planned.cold_start_s,
        "first_row": planned.measured.first_row_s if planned.measured is not None else None,
    }
    return {name: None if value is None else round(value, 2) for name, value in seconds.items()}


def _per_image(costs: Costs, timings: Timings | None, planned: Planned) -> dict[str, Any]:
    """Return milliseconds of a core, and of a GPU, for an image, by stage."""
    if timings is None or planned.measured is None:
        return {}
    images = np.maximum(costs.images, 1.0)
    stages = {"fetch": costs.wait_s, "decode": costs.prepare_s / images, "classify": costs.forward_s}
    if not planned.cluster.split:
        stages["idle"] = costs.gap_s
    core = {stage: Interval.of(draws * 1e3).public() for stage, draws in stages.items()}
    if not planned.cluster.split:
        total = Interval.of(sum(stages.values()) * 1e3).public()  # type: ignore[arg-type]
        return {"core_ms": {**core, "total": total}}
    gpus = planned.cluster.gpus / max(1, planned.cluster.actors)
    gpu = Interval.of(costs.forward_s * gpus * 1e3).public()
    core.pop("classify")
    return {"core_ms": core, "gpu_ms": {"classify": gpu}}


def _lines(timings: Timings | None) -> dict[str, dict[str, float]]:
    """Return the cost of decoding by format: milliseconds an image, a megabyte and a megapixel."""
    if timings is None:
        return {}
    return {
        FORMATS[format]: {
            "fixed_ms": round(line.fixed * 1e3, 4),
            "ms_per_mb": round(line.per_byte * 1e9, 4),
            "ms_per_megapixel": round(line.per_pixel * 1e9, 4),
        }
        for format, line in lines(timings).items()
    }


def _finish_by(planned: Planned, costs: Costs, chosen: Forecast) -> dict[str, Any] | None:
    """Return whether the run ends in time if it starts now, and the number of nodes that this takes."""
    if planned.finish_by is None:
        return None
    seconds = (planned.finish_by - planned.started).total_seconds()
    nodes = None
    if seconds > 0:
        nodes = forecasts.nodes_for(costs, planned.cluster, planned.measurements, seconds, planned.streams)
    end = Interval.of(chosen.total)
    return {
        "time": planned.finish_by.isoformat(),
        "seconds": round(seconds, 1),
        "ends": [(planned.started + timedelta(seconds=value)).isoformat(timespec="seconds") for value in (end.low, end.high)],
        "in_time": bool(np.quantile(chosen.total, 0.95) <= seconds),
        "nodes": nodes,
        "actors": None if nodes is None else planned.cluster.scaled(nodes).actors,
    }  # fmt: skip


def _prices(planned: Planned, chosen: Forecast) -> Iterator[dict[str, Any]]:
    """Yield the cost of the run for each price of a machine."""
    hours = Interval.of(chosen.total / 3600 * chosen.cluster.nodes)
    for price in planned.prices[:_MAX_PRICES]:
        row: dict[str, Any] = {"machine": price.machine, "region": price.region}
        for name, per_hour in (("on_demand", price.on_demand), ("spot", price.spot)):
            if per_hour is not None:
                row[f"{name}_per_hour"] = per_hour
                row[name] = replace(
                    hours, low=hours.low * per_hour, mid=hours.mid * per_hour, high=hours.high * per_hour
                ).public()
        yield row


def _price_file(catalogue: Catalogue | None) -> dict[str, Any] | None:
    if catalogue is None:
        return None
    modified = catalogue.modified
    return {"uri": catalogue.uri, "modified": None if modified is None else modified.isoformat(timespec="seconds")}


def _no_costs() -> Costs:
    zeros = np.zeros(DRAWS + 1)
    return Costs(zeros, zeros, zeros, zeros, zeros)
