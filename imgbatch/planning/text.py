"""Values: the plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from imgbatch.planning.forecast import PHASES
from imgbatch.terminal.plurals import counted, number

Document = Mapping[str, Any]
_STAGES = {
    "fetch": "fetch (waiting)",
    "decode": "decode, resize",
    "classify": "classify",
    "idle": "idle (Ray)",
    "total": "total",
}
_PHASES = {"start": "start", "listing": "listing", "work": "labelling", "end": "end, audit"}


def of(document: Document) -> str:
    """Return the plan for a terminal."""
    parts = [
        _head(document), _contents(document), _cost_of_an_image(document), _times(document), _bottleneck(document),
        _finish_by(document), _prices(document), _checks(document), _kept(document),
    ]  # fmt: skip
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part)))


def _head(document: Document) -> Iterator[str]:
    images, sample, cluster = document["images"], document["sample"], document["cluster"]
    yield f"plan for {', '.join(document['input'])} to {document['output']}, with {document['model']}"
    known = counted(images["listed"], "image")
    if images["streams"]:
        known = f"{images['listed']:,} known images, and those in {counted(images['streams'], 'tar')} that were not read yet"
    yield (
        f"{known} listed, {images['already_done']:,} already labelled or rejected; {_count(images['to_label'])} to label, "
        f"{_bytes(images['bytes'])}; {counted(images['ignored'], 'object')} ignored"
    )
    gpus = f", {counted(cluster['gpus'], 'GPU')}" if cluster["gpus"] else ""
    yield (
        f"cluster: {counted(cluster['nodes'], 'node')}, {counted(cluster['cpus'], 'CPU')}{gpus}: "
        f"{counted(cluster['actors'], 'actor')}"
    )
    if sample is None:
        yield "nothing to label: no sample was measured"
        return
    rejects = "".join(f", {count:,} {reason}" for reason, count in sample["rejects"].items())
    tars = f" from {counted(sample['streams'], 'tar')}" if sample["streams"] else ""
    yield (
        f"sample: {counted(sample['images'], 'image')}{tars}, {_bytes(sample['bytes'])}, seed {sample['seed']}, "
        f"{sample['seconds']:.1f} s{rejects}"
    )
    if sample["not_reached"]:
        yield f"{sample['not_reached']:,} images of the sample were not reached in time, or ended their process"


def _contents(document: Document) -> Iterator[str]:
    rows = [["format", "size", "images", "bytes", "to label", "sample", "megapixels", "decode ms"]]
    for row in document["contents"]:
        rows.append(
            [
                row["format"], row["size"], f"{row['images']:,}", _bytes(row["bytes"]), f"{row['to_label']:,}",
                f"{row['sampled']:,}", f"{row['megapixels']:.2f}" if "megapixels" in row else "",
                f"{row['decode_ms']:.2f}" if "decode_ms" in row else "",
            ]
        )  # fmt: skip
    yield from _table(rows, left=2)
    if document["images"]["streams"]:
        yield (
            f"  The names of the images in tars are not listed. Their number, {_count(document['images']['to_label'])}, is "
            "estimated from the bytes that an image took in the tars of the sample"
        )


def _cost_of_an_image(document: Document) -> Iterator[str]:
    for unit, name in (("core_ms", "milliseconds of a core"), ("gpu_ms", "milliseconds of a GPU")):
        if unit in document["per_image"]:
            yield f"{name} for an image, with 90 % intervals"
            yield from _table(
                [[_STAGES[stage], f"{_range(interval)}"] for stage, interval in document["per_image"][unit].items()],
                left=2,
            )


def _times(document: Document) -> Iterator[str]:
    forecast = document["forecast"]
    where = "" if forecast["nodes"] == document["cluster"]["nodes"] else f" on {counted(forecast['nodes'], 'node')}"
    yield f"time of a run{where}, with 90 % intervals"
    rows = [[_PHASES[phase], _span(forecast["seconds"][phase])] for phase in PHASES]
    rows.append(["total", _span(forecast["seconds"]["total"])])
    yield from _table(rows, left=2)
    if document["sample"] is not None:
        yield f"  {_range(forecast['images_per_second'], number)} images/s with {counted(forecast['actors'], 'actor')}"


def _bottleneck(document: Document) -> Iterator[str]:
    found = document["bottleneck"]
    if found is not None:
        share = "" if found["share"] == 1 else f" ({found['share']:.0%} of the time of the workers)"
        yield f"bottleneck: {found['stage']}{share}: {found['remedy']}"


def _finish_by(document: Document) -> Iterator[str]:
    found = document["finish_by"]
    if found is None:
        return
    low, high = (_clock(text) for text in found["ends"])
    yield (
        f"finish by {_clock(found['time'])} UTC: a run that starts now ends between {low} and {high} UTC, "
        f"{'in time' if found['in_time'] else 'too late'}"
    )
    if found["nodes"] is None:
        yield "  no number of nodes is enough: the start, the listing and the end take too long, or the time has passed"
    else:
        actors = counted(found["actors"], "actor")
        yield f"  it takes {counted(found['nodes'], 'node')} like those of the cluster, with {actors}"


def _prices(document: Document) -> Iterator[str]:
    if not document["prices"]:
        return
    file = document["price_file"]
    dated = f" of {file['modified'][:10]}" if file["modified"] else ""
    yield f"cost on {counted(document['forecast']['nodes'], 'node')}, in the currency of {file['uri']}{dated}"
    rows = [["machine", "region", "per hour", "on demand", "spot per hour", "spot"]]
    for price in document["prices"]:
        row = [price["machine"], price["region"]]
        for name in ("on_demand", "spot"):
            row += [f"{price[f'{name}_per_hour']:.4g}", _range(price[name], _money)] if name in price else ["", ""]
        rows.append(row)
    yield from _table(rows, left=2)


def _checks(document: Document) -> Iterator[str]:
    yield "checks"
    signs = {True: "ok", False: "no", None: "?"}
    yield from _table([[signs[check["passed"]], check["name"], check["text"]] for check in document["checks"]], left=3)


def _kept(document: Document) -> Iterator[str]:
    if document["kept"] is not None:
        yield f"kept as {document['kept']}; the next run compares itself with it"
    else:
        yield "not kept: the output cannot be written"


def _table(rows: Sequence[Sequence[str]], *, left: int) -> Iterator[str]:
    """Yield the lines of a table.

    Args:
        left: this number of columns is aligned to the left, the others to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()


def _span(interval: Mapping[str, float]) -> str:
    return _range(interval, _duration)


def _range(interval: Mapping[str, float], show: Any = None) -> str:
    """Return an interval as text.

    >>> _range({"low": 4.1, "mid": 4.5, "high": 5.06})
    '4.50  (4.10 to 5.06)'
    """
    show = show or (lambda value: f"{value:.2f}")
    low, mid, high = (show(interval[name]) for name in ("low", "mid", "high"))
    return mid if low == high else f"{mid}  ({low} to {high})"


def _count(interval: Mapping[str, float]) -> str:
    """Return a number of images; an interval if it is an estimate.

    >>> _count({"low": 5000, "mid": 5000, "high": 5000})
    '5,000'
    """
    low, mid, high = (f"{interval[name]:,.0f}" for name in ("low", "mid", "high"))
    return mid if low == high else f"about {mid} ({low} to {high})"


def _duration(seconds: float) -> str:
    """Return a duration.

    >>> _duration(4.25), _duration(95), _duration(7300)
    ('4.2 s', '1 min 35 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute} min" if hours else f"{minutes} min {second} s"


def _money(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _bytes(count: float) -> str:
    """Return a number of bytes.

    >>> _bytes(550_000_000), _bytes(12), _bytes(0)
    ('550.0 MB', '0.0 MB', 'size unknown')
    """
    if not count:
        return "size unknown"
    for unit, factor in (("TB", 1e12), ("GB", 1e9)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count / 1e6:,.1f} MB"


def _clock(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M")
