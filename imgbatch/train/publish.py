"""The model directory: what is in it, and the order in which it appears in the store.

`config.json` comes last, by conditional creation: a directory without it is no model to anybody, and of two runs one wins.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from imgbatch.errors import Exists, OutputError
from imgbatch.storage import Folder, is_local

CONFIG = "config.json"
RUN = "_training"
"""The folder below the output that holds what a run goes on from; it goes when the model is there."""


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
    for name, content in files.items():
        if name != CONFIG:
            output.put(name, content)
    try:
        output.create(CONFIG, files[CONFIG])
    except Exists as error:
        raise OutputError(f"another run has written a model to {output.uri} in the meantime") from error
    remove(output.folder(RUN))


def remove(folder: Folder) -> None:
    """Delete everything below a folder."""
    if is_local(folder.uri):  # which has folders, too
        shutil.rmtree(folder.uri, ignore_errors=True)
        return
    for name in folder.names():
        folder.delete(name)
