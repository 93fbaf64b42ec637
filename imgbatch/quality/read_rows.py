"""Effects: the rows that some runs wrote, read from the end of both logs.

The logs are append-only, and the footer of a part names the run that wrote it. So the rows of the last runs are read without
the parts before them, and without a column for the run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing

import pyarrow as pa

from imgbatch.concurrency.monitor import tick
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.part_file import Footer
from imgbatch.ledger.status import LABELS_LOG, REJECTS_LOG
from imgbatch.quality.row_counts import LABEL, SCORE, RowCounts, RunRange
from imgbatch.storage.stores import Folder

_COLUMNS: dict[str, tuple[list[str], list[str], Callable[[RowCounts, pa.Table], None]]] = {
    LABELS_LOG: ([], [LABEL, SCORE], RowCounts.add_labels),
    REJECTS_LOG: (["reason", "passing"], [], RowCounts.add_rejects),
}
"""By table: the columns that are read, those that are read if the table has them, and what counts the rows."""


def count_rows(
    output: Folder,
    ranges: Sequence[RunRange],
    part_numbers: Mapping[str, Sequence[int]] | None = None,
    tables: Sequence[str] = (LABELS_LOG, REJECTS_LOG),
) -> list[RowCounts]:
    """Return the counts of the rows of each range of runs.

    Args:
        output: the folder of the output.
        ranges: one or more.
        part_numbers: the numbers of the parts, by table; None: they are listed.
        tables: which tables to read.

    Raises:
        OutputError: a part is damaged, or was not written by imgbatch.
    """
    counts = [RowCounts() for _ in ranges]
    first = min(runs.after for runs in ranges)
    for name in tables:
        log = Log(output.folder(name), (part_numbers or {}).get(name, ()))
        if part_numbers is None:
            log.scan()
        columns, optional, add = _COLUMNS[name]
        with closing(newest_parts(log, columns, optional, first)) as parts:
            for footer, rows in parts:
                tick()
                for runs, counted in zip(ranges, counts, strict=True):
                    if len(rows) and runs.contains(footer.run_id):
                        add(counted, rows)
    return counts


def newest_parts(
    log: Log, columns: Sequence[str], optional: Sequence[str], after: str
) -> Generator[tuple[Footer, pa.Table], None, None]:
    """Yield the footer and the rows of each part, the newest first, as long as the runs are later than `after`.

    Each successful run ends the logs with seals, so that no part of an earlier run is after them.
    """
    newest_first = Log(log.folder, log.numbers[::-1])
    for _, rows, footer in newest_first.read(columns, optional):
        if footer.run_id <= after:
            return
        yield footer, rows
