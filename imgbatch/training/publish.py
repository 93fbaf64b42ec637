"""Effects: the model directory: what is in it, and the order in which it appears in the store.

`config.json` comes last, by conditional creation: a directory without it is no model to anybody, and of two runs one wins.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from imgbatch.errors import Exists, OutputError
from imgbatch.storage.stores import Folder
from imgbatch.storage.uris import is_local

CONFIG = "config.json"
RUN = "_training"
"""The folder below the output that holds what a run goes on from; it goes when the model is there."""
RECORD = "training.json"

_NOT_ALWAYS = ("taxonomy.csv", "taxonomy.json", "rejects.parquet")


def require_room(output: Folder) -> None:
    """Refuse a place where something is already.

    Raises:
        OutputError: a model, or objects that no training has left there.
    """
    if output.exists(CONFIG):
        raise OutputError(
            f"--output {output.uri} holds a model already, and none is ever overwritten: choose another place, or delete it"
        )
    names = output.names()
    foreign = [name for name in names if not name.startswith(f"{RUN}/")]
    if foreign and len(foreign) == len(names):
        raise OutputError(
            f"--output {output.uri} is not empty, {foreign[0]} is there: choose an empty place for the model"
        )


def publish(output: Folder, files: Mapping[str, bytes]) -> None:
    """Write the files of a model directory, and take the run's folder away.

    Raises:
        OutputError: another run was first.
    """

    def unless_there(name: str) -> Callable[[bytes | None], bytes]:
        """Return what gives the content, as long as no other run has finished: one may have slept through all of it."""

        def content(_: bytes | None) -> bytes:
            if output.exists(CONFIG):
                raise _second(output)
            return files[name]

        return content

    for name in files:
        if name != CONFIG:
            output.change(name, unless_there(name))
    for name in _NOT_ALWAYS:
        if name not in files:  # of a run that was killed here, and had another --taxonomy perhaps
            output.delete(name)
    try:
        output.create(CONFIG, files[CONFIG])
    except Exists as error:
        raise _second(output) from error
    remove(output.folder(RUN))


def finished(output: Folder, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Return whether a run of this config has written its model, and was killed while it cleared up; that is done now.

    Args:
        defaults: what keys mean that an older version did not record.
    """
    if not output.exists(CONFIG) or not output.names(RUN):
        return False
    record = json.loads(output.read(RECORD)) if output.exists(RECORD) else {}
    ours, unset = (json.loads(json.dumps(each, default=str)) for each in (config, defaults))
    if not record or _completed(record.get("config", {}), unset) != ours:
        return False
    remove(output.folder(RUN))
    return True


def _completed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the default of each key that it lacks.

    >>> _completed({"train": {"seed": 1}}, {"train": {"seed": 0, "l2": None}, "output": ""})
    {'train': {'seed': 1, 'l2': None}, 'output': ''}
    """
    found = {**defaults, **config}
    nested = [key for key, value in defaults.items() if isinstance(value, dict) and isinstance(found[key], dict)]
    return found | {key: _completed(found[key], defaults[key]) for key in nested}


def _second(output: Folder) -> OutputError:
    return OutputError(f"another run has written a model to {output.uri} in the meantime")


def remove(folder: Folder) -> None:
    """Delete everything below a folder."""
    if is_local(folder.uri):  # which has folders, too
        shutil.rmtree(folder.uri, ignore_errors=True)
        return
    for name in folder.names():
        folder.delete(name)
