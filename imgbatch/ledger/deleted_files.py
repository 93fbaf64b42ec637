"""Effects: detection of files of an output that were deleted during the run. It is used only when a run has failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imgbatch.errors import NotFound
from imgbatch.storage.stores import Folder


def describe_deletion(output: Folder, names_by_folder: Mapping[str, Sequence[str]]) -> str:
    """Return a sentence about objects that were deleted, "" if all exist. It makes one listing for each folder.

    Args:
        output: the folder of the output.
        names_by_folder: the names of the objects that the run has read or written, in this order, by folder below the output.
    """
    names_by_folder = {folder: names for folder, names in names_by_folder.items() if names}
    missing: dict[str, list[str]] = {}
    for folder, names in names_by_folder.items():
        try:
            existing = set(output.names(folder))
        except NotFound as error:  # the bucket
            return _sentence(output.uri, str(error))
        missing[folder] = [name for name in names if name not in existing]
    # The run continues to write into an emptied folder. So a folder was emptied if exactly its oldest objects are missing.
    oldest = [
        folder for folder, names in missing.items() if names and names == [*names_by_folder[folder][: len(names)]]
    ]
    if len(oldest) == len(names_by_folder) > 1:
        return _sentence(output.uri)
    emptied = [folder for folder in oldest if len(missing[folder]) > 1 or len(names_by_folder[folder]) == 1]
    if emptied:
        return _sentence(" and ".join(output.at(folder) for folder in emptied))
    for folder, names in missing.items():
        if names:
            return _sentence(
                f"{output.at(folder)}/{names[0]}",
                f"{len(names):,} of {len(names_by_folder[folder]):,} objects in it are missing",
            )
    return ""


def _sentence(subject: str, detail: str = "") -> str:
    suffix = f" ({detail})" if detail else ""
    return f"{subject} was deleted or emptied during this run{suffix}. The same command restores it"
