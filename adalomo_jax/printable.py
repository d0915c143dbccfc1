"""Texts from elsewhere in messages: names of files, values, what libraries say."""

from __future__ import annotations


def printable(text: object, most: int | None = None) -> str:
    """A text on one line, without what a terminal obeys or cannot show, cut if it is longer than ``most`` characters.

    >>> printable("a\\nb\\x1b[31m"), printable("name_\\udcff"), printable("abcdef", 3)
    ('a\\\\nb\\\\x1b[31m', 'name_\\\\udcff', 'abc...')
    """
    found = str(text)[: None if most is None else most + 1]
    found = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in found)
    return found if most is None or len(found) <= most else f"{found[:most]}..."
