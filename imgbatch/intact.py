"""Was something deleted from an output while a run was at work there? It is asked when the run fails, not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imgbatch.errors import NotFound, OutputChangedError
from imgbatch.storage import Folder


def require_intact(output: Folder, seen: Mapping[str, Sequence[str]]) -> None:
    """Name what is gone of the objects that a run has seen or written, one listing for each folder.

    Args:
        seen: the names of the objects, by the folder below the output.

    Raises:
        OutputChangedError: some, or all of a folder, are gone.
    """
    seen = {folder: names for folder, names in seen.items() if names}
    try:
        there = {folder: set(output.names(folder)) for folder in seen}
    except NotFound as error:  # the bucket
        raise _deleted(output.uri, str(error)) from error
    emptied = [folder for folder, names in seen.items() if there[folder].isdisjoint(names)]
    if emptied:
        everything = len(emptied) == len(seen) > 1
        raise _deleted(output.uri if everything else " and ".join(output.at(folder) for folder in emptied))
    for folder, names in seen.items():
        if gone := sorted(set(names) - there[folder]):
            raise _deleted(f"{output.at(folder)}/{gone[0]}", f"{len(gone):,} of {len(names):,} objects there are gone")


def _deleted(what: str, more: str = "") -> OutputChangedError:
    return OutputChangedError(
        f"{what} was deleted or emptied while this run was at work{f' ({more})' if more else ''}. The same command restores it"
    )
