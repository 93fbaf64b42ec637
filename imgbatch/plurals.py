"""Numbers of things in log lines and messages. Pure."""

from __future__ import annotations


def plural(number: float, one: str, many: str | None = None) -> str:
    """Return the singular for one thing, else the plural.

    >>> plural(1, "class", "classes"), plural(0, "image")
    ('class', 'images')
    """
    return one if number == 1 else many or f"{one}s"


def counted(number: float, one: str, many: str | None = None) -> str:
    """Return a number of things, with thousands separated.

    >>> counted(1, "image"), counted(1234, "image"), counted(0, "class", "classes")
    ('1 image', '1,234 images', '0 classes')
    >>> counted(1.0, "GPU"), counted(0.5, "GPU")
    ('1 GPU', '0.5 GPUs')
    """
    shown = f"{int(number):,}" if number == int(number) else f"{number:g}"
    return f"{shown} {plural(number, one, many)}"


def rate(per_second: float, one: str) -> str:
    """Return a rate; what is shown as 1 is singular.

    >>> rate(0.8, "image"), rate(1234.4, "image")
    ('1 image/s', '1,234 images/s')
    """
    return f"{per_second:,.0f} {plural(round(per_second), one)}/s"
