"""Values: what the ledger says of a listed image, and what its two logs are called."""

from __future__ import annotations

NEW, DONE, STALE, DUPLICATE = range(4)
"""What the ledger says of a listed image: no row yet; a row that holds; one that must be replaced; listed before."""


LABELS_LOG, REJECTS_LOG = "labels", "rejects"
