"""Effects: was something deleted from an output while a run was at work there? It is asked when the run fails, not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imgbatch.errors import NotFound
from imgbatch.storage.stores import Folder


def describe_deletion(output: Folder, seen: Mapping[str, Sequence[str]]) -> str:
    """Return what to say of objects that are gone, "" if all are there. One listing for each folder.

    Args:
        seen: the names of the objects that the run has seen or written, in their order, by the folder below the output.
    """
    seen = {folder: names for folder, names in seen.items() if names}
    gone: dict[str, list[str]] = {}
    for folder, names in seen.items():
        try:
            there = set(output.names(folder))
        except NotFound as error:  # the bucket
            return _said(output.uri, str(error))
        gone[folder] = [name for name in names if name not in there]
    # What a run has written since is there: a folder was emptied if the oldest objects are gone, and no others.
    oldest = [folder for folder, names in gone.items() if names and names == [*seen[folder][: len(names)]]]
    if len(oldest) == len(seen) > 1:
        return _said(output.uri)
    emptied = [folder for folder in oldest if len(gone[folder]) > 1 or len(seen[folder]) == 1]
    if emptied:
        return _said(" and ".join(output.at(folder) for folder in emptied))
    for folder, names in gone.items():
        if names:
            return _said(
                f"{output.at(folder)}/{names[0]}", f"{len(names):,} of {len(seen[folder]):,} objects there are gone"
            )
    return ""


def _said(what: str, more: str = "") -> str:
    more = f" ({more})" if more else ""
    return f"{what} was deleted or emptied while this run was at work{more}. The same command restores it"
