"""Values: the common parts of all pages: the document with its style, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_VIEWPORT = '<meta name="viewport" content="width=device-width">'
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .2rem .8rem .2rem 0; text-align: left }
th { border-bottom: 1px solid #999; font-weight: 600 } td { border-bottom: 1px solid #eee }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.side { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem }
.pictures img { max-width: 100%; height: 9rem; object-fit: contain; background: #f4f4f4 }
.warning { border-left: .3rem solid #c0392b; background: #fdf0ee; padding: .6rem .8rem; overflow-wrap: anywhere }
figure { margin: 0; font-size: .85rem; overflow-wrap: anywhere } p.note { color: #666 } svg { max-width: 100%; height: auto }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """Return a page with a title, which is escaped here, and parts, which are HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_VIEWPORT}<title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table, with all texts escaped. A column is right-aligned if its head begins with #."""

    def line(values: Sequence[Any], tag: str) -> str:
        cells = []
        for name, value in zip(head, values, strict=True):
            text = escape(f"{value:,}" if isinstance(value, int) else value)
            cells.append(f"<{tag}{' class=n' if name.startswith('#') else ''}>{text}</{tag}>")
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{line([name.lstrip('#') for name in head], 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
