"""imgbatch: label every image of an object store with a CNN, as one batch job whose tables can be trusted.

The modules follow the way of an image: `sources` list it, `fetch` reads it, `decode` makes pixels of it,
`classify` labels them, `ledger` writes the row and `books` counts that none is missing. `jobs/` holds the programs.
"""

import os

# Arrow reads this once, when it is first imported. Its own allocator keeps what was freed, and the driver's memory
# goes up in steps of 4 MB for as long as rows come (docs/LOG.md).
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

__version__ = "0.2.0"
