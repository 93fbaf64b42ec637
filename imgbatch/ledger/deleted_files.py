"""Effects: find out whether files of an output were deleted during the run. It is asked only when a run has failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imgbatch.errors import NotFound
from imgbatch.storage.stores import Folder


def describe_deletion(output: Folder, seen: Mapping[str, Sequence[str]]) -> str:
    """Return a sentence about the objects that are gone, "" if all exist. One listing for each folder.

    Args:
        output: the folder of the output.
        seen: the names of the objects that the run has read or written, in this order, by folder below the output.
    """
    seen = {folder: names for folder, names in seen.items() if names}
    gone: dict[str, list[str]] = {}
    for folder, names in seen.items():
        try:
            existing = set(output.names(folder))
        except NotFound as error:  # the bucket
            return _sentence(output.uri, str(error))
        gone[folder] = [name for name in names if name not in existing]
    # The run goes on writing into an emptied folder. So a folder was emptied if its oldest objects are gone, and no others.
    oldest = [folder for folder, names in gone.items() if names and names == [*seen[folder][: len(names)]]]
    if len(oldest) == len(seen) > 1:
        return _sentence(output.uri)
    emptied = [folder for folder in oldest if len(gone[folder]) > 1 or len(seen[folder]) == 1]
    if emptied:
        return _sentence(" and ".join(output.at(folder) for folder in emptied))
    for folder, names in gone.items():
        if names:
            return _sentence(
                f"{output.at(folder)}/{names[0]}", f"{len(names):,} of {len(seen[folder]):,} objects there are gone"
            )
    return ""


def _sentence(what: str, more: str = "") -> str:
    more = f" ({more})" if more else ""
    return f"{what} was deleted or emptied during this run{more}. The same command restores it"
