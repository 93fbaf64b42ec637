"""Values: what is known of one image, as text for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from imgbatch.labelling.json_values import plain
from imgbatch.ledger.fingerprint import short_digest
from imgbatch.schema import CARRIED, EMBEDDING
from imgbatch.verification.comparison import is_changed

_WIDTH = 12
_VERSION = ("etag", "size", "last_modified")


@dataclass(frozen=True, slots=True)
class Listed:
    """An image, or the container that holds it, in the listing of a run."""

    run_id: str
    row: Mapping[str, Any]
    """Of the listing."""


@dataclass(frozen=True, slots=True)
class Now:
    """What the model says now."""

    model: str
    row: Mapping[str, Any]
    """A row of results."""
    difference: str | None
    """How it differs from the row in the table; None if it agrees, or cannot be compared."""
    changed: bool
    """Whether the image has another version than in the table."""
    image: str | None = None
    """Where the image was written as the network sees it."""


@dataclass(kw_only=True)
class Explanation:
    """What is known of one image."""

    uri: str
    output: str
    status: str
    """labelled, rejected, or listed: without a row."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Its row in labels/ or rejects/; empty without one."""
    part: str | None = None
    part_row: int = 0
    """The number of the row in the part, from 0."""
    part_rows: int = 0
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    runs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The run.json of the runs that are mentioned, by their ids."""
    listings: Sequence[Listed] = ()
    """Newest first."""
    now: Now | None = None

    def public(self) -> dict[str, Any]:
        """Return everything as values that JSON can hold."""
        values: dict[str, Any] = {"uri": self.uri, "output": self.output, "status": self.status}
        if self.part is not None:
            values["row"] = plain(self.row)
            values["part"] = {"uri": self.part, "row": self.part_row, "rows": self.part_rows}
            values["fingerprint"] = {"digest": short_digest(self.fingerprint), **plain(self.fingerprint)}
        values["listings"] = [{"run_id": entry.run_id, **plain(entry.row)} for entry in self.listings]
        values["runs"] = {run_id: _run_facts(record) for run_id, record in self.runs.items()}
        if self.now is not None:
            row = {name: value for name, value in self.now.row.items() if value is not None and name != "index"}
            now = {"model": self.now.model, "row": plain(row), "difference": self.now.difference}
            values["now"] = {**now, "changed": self.now.changed, "image": self.now.image}
        return values

    def __str__(self) -> str:
        lines = [self.uri, *(f"  {name:<{_WIDTH}} {text}" for name, text in self._lines())]
        return "\n".join(line.replace("\n", "\\n").replace("\r", "\\r") for line in lines)

    def _lines(self) -> Iterator[tuple[str, str]]:
        if self.status == "listed":
            yield "status", "listed, but without a row: run the same classify command again, which labels it"
        elif self.status == "rejected":
            yield from _reject_lines(self.row)
        else:
            yield from _label_lines(self.row)
        if self.part is not None:
            yield from _object_lines(self.row)
            yield "part", f"{self.part}, row {self.part_row + 1:,} of {self.part_rows:,}"
            yield "fingerprint", short_digest(self.fingerprint)
            yield from self._run_lines()
        for entry in self.listings:
            yield "listed", f"by {entry.run_id}{self._version_note(entry)}"
        carried = {name: value for name, value in self._carried().items() if value is not None}
        for name, value in carried.items():
            yield name, _short(str(value))
        if self.now is not None:
            yield from self._now_lines(self.now)

    def _carried(self) -> Mapping[str, Any]:
        row = self.row or (self.listings[0].row if self.listings else {})
        return {name: value for name, value in row.items() if name.startswith(CARRIED)}

    def _run_lines(self) -> Iterator[tuple[str, str]]:
        run_id = self.row.get("run_id")
        if run_id is None:
            return
        record = _run_facts(self.runs.get(run_id, {}))
        facts = [str(record[name]) for name in ("status", "device", "runtime", "dtype") if record.get(name)]
        if record.get("started"):
            facts.insert(0, f"started {record['started']}")
        yield "run", f"{run_id}: {', '.join(facts) or 'its run.json is missing'}"
        yield "model", str(self.row.get("model") or record.get("model") or "unknown")

    def _version_note(self, entry: Listed) -> str:
        """Return how the version in a listing compares with that of the row."""
        status = self.runs.get(entry.run_id, {}).get("status")
        text = f" ({status})" if status else ""
        if not self.row or entry.row.get("container") is not None:
            return text
        old, new = ({name: row.get(name) for name in _VERSION} for row in (self.row, entry.row))
        if not is_changed(old, new):
            return f"{text} in this version"
        name = next(name for name in _VERSION if None not in (old[name], new[name]) and old[name] != new[name])
        return f"{text} with another {name}, {new[name]}: the next run labels it again"

    def _now_lines(self, now: Now) -> Iterator[tuple[str, str]]:
        yield "now", f"by {now.model}:"
        yield from _reject_lines(now.row) if now.row["reason"] is not None else _label_lines(now.row)
        if now.changed:
            yield "compared", "the image has changed since: it cannot be compared with the row"
        elif self.status == "labelled":
            yield "compared", now.difference or "the same as in the table"
        if now.image is not None:
            yield "network sees", now.image


def _label_lines(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if row.get("label") is not None:
        number = f", class {row['label_id']}" if row.get("label_id") is not None else ""
        yield "label", f"{_name(row['label'])}{_score(row.get('score'))}{number}"
    others = [f"{_name(entry['label'])}{_score(entry['score'])}" for entry in (row.get("top_k") or [])[1:]]
    if others:
        yield "next best", ", ".join(others)
    levels = [f"{entry['level']}: {_name(entry['label'])}{_score(entry['score'])}" for entry in row.get("levels") or []]
    if levels:
        yield "levels", " > ".join(levels)
    if row.get("answer") is not None:
        level = f", level {row['answer_level']}" if row.get("answer_level") else ""
        yield "answer", f"{_name(row['answer'])}{_score(row.get('answer_score'))}{level}"
    elif "answer" in row:
        yield "answer", "none: no level is sure enough (answer.min_score)"


def _reject_lines(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kind = "transient: the next run tries it again" if row.get("passing") else "permanent, until the image changes"
    attempts = f", {row['attempts']} attempts" if (row.get("attempts") or 1) > 1 else ""
    yield "rejected", f"{row['reason']} in {row['stage']}{attempts} ({kind})"
    yield "message", _short(str(row.get("message")), 500)


def _object_lines(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    facts = [f"{row['width']}×{row['height']} px"] if row.get("width") else []
    facts += [f"{row['size']:,} bytes"] if row.get("size") is not None else []
    facts += [f"etag {row['etag']}"] if row.get("etag") else []
    if isinstance(row.get("last_modified"), datetime):
        facts.append(f"changed {row['last_modified'].isoformat(timespec='seconds')}")
    if row.get(EMBEDDING) is not None:
        facts.append(f"embedding of {len(row[EMBEDDING]):,} numbers")
    if facts:
        yield "object", ", ".join(facts)


def _run_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a run that explain a label."""
    names = ("status", "exit_code", "started", "finished", "device", "runtime", "dtype", "batch_size")
    facts = {name: record[name] for name in names if record.get(name) is not None}
    model = record.get("model")
    if isinstance(model, dict) and model.get("name"):
        facts["model"] = model["name"]
    versions = record.get("versions")
    if isinstance(versions, dict) and versions.get("imgbatch"):
        facts["imgbatch"] = versions["imgbatch"]
    return facts


def _name(label: Any) -> str:
    return _short(str(label))


def _short(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def _score(score: float | None) -> str:
    return "" if score is None else f" {score:.3f}"
