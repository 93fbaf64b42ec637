"""Effects: the label tables that an evaluation scores, and the record of the run that wrote them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from imgbatch.config.sections import ModelConfig
from imgbatch.errors import InputError, NotFound, OutputError
from imgbatch.evaluation.predictions import READ, has_hashes
from imgbatch.evaluation.training_images import TrainingImages
from imgbatch.ledger.commit_log import Log
from imgbatch.models.model import Model
from imgbatch.schema import labels_with
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute

_REFUSED = OutputError.exit_code  # a run with this exit code has written none of the rows


@dataclass(frozen=True, slots=True)
class LabelTables:
    """The tables of an output that are scored, and facts about the model that wrote them."""

    output: Folder
    model: Model
    temperature: float | None
    """The temperature that the model was calibrated with; None: none, or unknown."""
    training_images: TrainingImages | None
    """The images that the model has seen in training; None: not known."""


def temperature_of(name: str, stores: Stores) -> float | None:
    """Return the temperature that a trained model directory was calibrated with, None if there is none."""
    if "/" not in name and not name.startswith("."):
        return None
    try:
        temperature = json.loads(Folder(stores, absolute(name)).read("training.json")).get("temperature")
    except (NotFound, ValueError, AttributeError):
        return None
    return float(temperature) if isinstance(temperature, int | float) and temperature > 0 else None


def lacks_hashes(output: Folder) -> bool:
    """Return whether an output holds rows that were written without `output.content_hash`."""
    for name in ("labels", "rejects"):
        log = Log(output.folder(name))
        log.scan()
        if log.numbers:
            return not has_hashes(log)
    return False


def last_record(output: Folder) -> dict[str, Any]:
    """Return the record of the last run that may have written rows to an output; empty if there is none."""
    for name in sorted(output.folders("runs"), reverse=True):
        with suppress(NotFound, ValueError):
            record = json.loads(output.read(f"runs/{name}/run.json"))
            is_complete = isinstance(record, dict) and {"model", "config"} <= record.keys()
            if is_complete and record.get("exit_code") != _REFUSED:
                return dict(record)
    return {}


def recorded_model(record: dict[str, Any], config: ModelConfig) -> ModelConfig:
    """Return the config of the model that wrote an output, with those options of `config` that are not the defaults.

    Args:
        record: see `last_record`.
    """
    options = record["config"].get("model", {})
    if not options.get("weights"):  # with weights, the recorded name is that of the file
        options = {**options, "name": str(record["model"]["name"])}
    defaults = {field.name: field.default for field in fields(config)}
    changed = {name: getattr(config, name) for name, default in defaults.items() if getattr(config, name) != default}
    return ModelConfig(**{name: options[name] for name in defaults.keys() & options.keys()} | changed)


def require_columns(output: Folder, columns: Sequence[str]) -> None:
    """Refuse tables without a column that is scored.

    Args:
        columns: `output.columns` of the run that wrote them; empty: all columns.

    Raises:
        InputError: with the missing columns.
    """
    if missing := set(READ) - set(labels_with(columns, 1, hashed=True).names):
        raise InputError(
            f"{output.at('labels')} lacks the columns {', '.join(sorted(missing))}: it was written with output.columns; label "
            "again without that option, or with these columns"
        )
