"""Values: the statuses of a listed image in the ledger, and the names of the two logs."""

from __future__ import annotations

NEW, DONE, STALE, DUPLICATE = range(4)
"""The status of a listed image: it has no row; a row that is kept; a row that will be replaced; it was listed before."""

LABELS_LOG, REJECTS_LOG = "labels", "rejects"
