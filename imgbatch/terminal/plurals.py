"""Values: numbers and times in log lines and messages."""

from __future__ import annotations


def plural(number: float, singular: str, plural_form: str | None = None) -> str:
    """Return the singular form for 1, else the plural form; None: the singular with an s.

    >>> plural(1, "class", "classes"), plural(0, "image")
    ('class', 'images')
    """
    return singular if number == 1 else plural_form or f"{singular}s"


def counted(number: float, singular: str, plural_form: str | None = None) -> str:
    """Return a number with its noun, and with thousands separated.

    >>> counted(1, "image"), counted(1234, "image"), counted(0, "class", "classes")
    ('1 image', '1,234 images', '0 classes')
    >>> counted(1.0, "GPU"), counted(0.5, "GPU")
    ('1 GPU', '0.5 GPUs')
    """
    shown = f"{int(number):,}" if number == int(number) else f"{number:g}"
    return f"{shown} {plural(number, singular, plural_form)}"


def rate(per_second: float, singular: str) -> str:
    """Return a rate with its unit; with one decimal if it is less than 10.

    >>> rate(1234.5, "image"), rate(3.25, "image"), rate(0.0, "image")
    ('1,234 images/s', '3.2 images/s', '0 images/s')
    """
    return f"{number(per_second)} {singular}s/s"


def number(per_second: float) -> str:
    """Return the number of a rate; with one decimal if it is less than 10.

    >>> number(1234.5), number(3.25), number(1.0), number(0.0)
    ('1,234', '3.2', '1.0', '0')
    """
    return f"{per_second:,.0f}" if per_second >= 10 or not per_second else f"{per_second:.1f}"


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss or m:ss.

    >>> clock(3725.9), clock(25)
    ('1:02:05', '0:25')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
