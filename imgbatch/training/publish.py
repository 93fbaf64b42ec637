"""Effects: the model directory, and the order in which its files are written.

`config.json` is written last, by conditional creation: a directory without it is no model, and of two concurrent runs only
one succeeds.
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
"""The folder below the output from which a run resumes; it is removed once the model is written."""
RECORD = "training.json"

_OPTIONAL = ("taxonomy.csv", "taxonomy.json", "rejects.parquet")


def require_room(output: Folder) -> None:
    """Refuse an output that is not empty, unless it is that of an unfinished training run.

    Raises:
        OutputError: it holds a model, or objects that no training run has written.
    """
    if output.exists(CONFIG):
        raise OutputError(
            f"--output {output.uri} holds a model already, which is not overwritten: choose another location, or delete it"
        )
    names = output.names()
    foreign = [name for name in names if not name.startswith(f"{RUN}/")]
    if foreign and len(foreign) == len(names):
        raise OutputError(
            f"--output {output.uri} is not empty, it contains {foreign[0]}: choose an empty location for the model"
        )


def publish(output: Folder, files: Mapping[str, bytes]) -> None:
    """Write the files of a model directory, and remove the folder of the run.

    Raises:
        OutputError: another run has written a model.
    """

    def unless_published(name: str) -> Callable[[bytes | None], bytes]:
        """Return a function that returns the content of a file, or raises if another run has finished in the meantime.

        It is called again before each attempt to write: this process may have been suspended for any time.
        """

        def content(_: bytes | None) -> bytes:
            if output.exists(CONFIG):
                raise _already_published(output)
            return files[name]

        return content

    for name in files:
        if name != CONFIG:
            output.change(name, unless_published(name))
    for name in _OPTIONAL:
        if name not in files:  # left by a run that was killed here and may have had another --taxonomy
            output.delete(name)
    try:
        output.create(CONFIG, files[CONFIG])
    except Exists as error:
        raise _already_published(output) from error
    remove(output.folder(RUN))


def finished(output: Folder, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Clean up after a run with this config that was killed when it had written its model; return whether there was one.

    Args:
        defaults: the values of keys that an older version did not record.
    """
    if not output.exists(CONFIG) or not output.names(RUN):
        return False
    record = json.loads(output.read(RECORD)) if output.exists(RECORD) else {}
    this_config, unset = (json.loads(json.dumps(values, default=str)) for values in (config, defaults))
    if not record or _completed(record.get("config", {}), unset) != this_config:
        return False
    remove(output.folder(RUN))
    return True


def _completed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the defaults of the keys that it lacks.

    >>> _completed({"train": {"seed": 1}}, {"train": {"seed": 0, "l2": None}, "output": ""})
    {'train': {'seed': 1, 'l2': None}, 'output': ''}
    """
    completed = {**defaults, **config}
    nested = [key for key, value in defaults.items() if isinstance(value, dict) and isinstance(completed[key], dict)]
    return completed | {key: _completed(completed[key], defaults[key]) for key in nested}


def _already_published(output: Folder) -> OutputError:
    return OutputError(f"another run has written a model to {output.uri} in the meantime")


def remove(folder: Folder) -> None:
    """Delete everything below a folder."""
    if is_local(folder.uri):  # local folders would remain if only files were deleted
        shutil.rmtree(folder.uri, ignore_errors=True)
        return
    for name in folder.names():
        folder.delete(name)
