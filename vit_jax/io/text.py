"""Formats values as text: numbers, and names of files, classes and labels, which are untrusted.

A name may have a newline, escape sequences of a terminal, characters that reverse the direction of
text, or bytes that are not UTF-8. Stored values stay exact; printed lines are escaped.
"""

import json
import math
import re
import unicodedata
from collections.abc import Container, Sequence
from typing import Any

# Control characters, surrogates, line and paragraph separators, and format characters: direction
# marks, zero-width joiners, tags. The two joiners that spell words and emoji are kept.
ESCAPED = ('Cc', 'Cs', 'Zl', 'Zp', 'Cf')
JOINERS = '\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}'
UNITS = (('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3))
FORMULA = re.compile(r'[=+\-@](?![\d.]+$)')


def printable(value: object, keep: str = '') -> str:
    """str(value) in one line that any terminal shows literally, except for the characters `keep`.

    Characters that are invisible or have an effect are escaped as in Python: '\\n', '\\x1b',
    '\\u202e'. A byte of a file name that is not UTF-8 (Python's surrogateescape) is '\\xff'.
    """
    text = str(value)
    if text.isprintable():
        return text
    return ''.join(c if c in keep or not escaped(c) else escape(c) for c in text)


def escaped(character: str) -> bool:
    """Whether a character is invisible or has an effect on a terminal."""
    return unicodedata.category(character) in ESCAPED and character not in JOINERS


def escape(character: str) -> str:
    """The escape sequence of a character, as in Python."""
    code = ord(character)
    byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else None
    return f'\\x{byte:02x}' if byte else character.encode('unicode_escape').decode()


def cell(value: object) -> object:
    """Formats a name as a cell of a CSV file: printable, and not a formula in a spreadsheet.

    Text that begins with =, +, - or @ and is not a number gets an apostrophe before it.
    """
    text = printable(value)
    return f"'{text}" if FORMULA.match(text) else text


def brief(value: object) -> str:
    """Shortens text of a file to fit one line of a message."""
    try:
        text = ' '.join(str(value).split())
    except ValueError:  # Python does not print integers of thousands of digits
        text = 'a huge number'
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f'{text[:200]}...'


def to_json(value: object, indent: int | None = None) -> str:
    """Formats JSON (RFC 8259) in ASCII; NaN and infinity, which it does not have, become null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False).replace('\x7f', '\\u007f')


def finite(value: Any) -> Any:
    """Copies what JSON can represent, with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> str:
    """Formats an int in full and any other number to four digits; None means not finite."""
    if value is None or not math.isfinite(value):
        return 'not finite'
    return f'{value:,}' if isinstance(value, int) else f'{value:.4g}'


def flop(count: float) -> str:
    """Formats a number of operations with its unit: '35.2 GFLOP'."""
    unit, scale = next((u, s) for u, s in UNITS if count >= s or s == UNITS[-1][1])
    return f'{count / scale:.3g} {unit}FLOP'


def aligned(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Formats rows of text as lines with aligned columns, two spaces apart.

    Columns whose index is in `right` are aligned to the right. Lines have no trailing spaces.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
