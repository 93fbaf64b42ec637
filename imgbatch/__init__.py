"""imgbatch: label every image of an object store with a CNN, as one batch job whose tables can be trusted.

The modules follow the way of an image: `sources` list it, `fetch` reads it, `decode` makes pixels of it,
`classify` labels them, `ledger` writes the row and `books` counts that none is missing. `jobs/` holds the programs.
"""

__version__ = "0.1.0"
