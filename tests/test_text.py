"""Names from outside as a line shows them, and values as strict JSON."""

import json
import unicodedata

import pytest

from vit_jax.io import text

HOSTILE = 'a\n\t\x1b[2J\x9b31m\r\x00\x7f\u202eb\u2066\u200f\u061c\u2028\u2029\ufeff\udcff\x85\ud800'


def test_no_character_of_a_printable_text_moves_the_cursor_or_fails_to_encode():
    """Every code point of Unicode, in one go; a private-use or unassigned one does nothing."""
    for code in range(0x110000):
        shown = text.printable(chr(code))
        assert shown == chr(code) or shown.isascii() and shown.isprintable()
        shown.encode()
        kind = unicodedata.category(shown[0])
        assert kind[0] != 'C' or kind in ('Co', 'Cn') or shown in text.JOINERS
        assert kind not in ('Zl', 'Zp')
    assert text.printable(HOSTILE).isprintable()


@pytest.mark.parametrize(
    'name', ['Zürich', '猫\u3000犬', 'Screenshot 3.00\u202fPM.png', '👩\u200d🔬', 'a\\b']
)
def test_honest_names_stay(name):
    assert text.printable(name) == name


def test_escapes_are_those_of_python():
    assert text.printable('a\nb\x1b\u202e\udcff') == r'a\nb\x1b\u202e\xff'
    assert text.printable('two\nlines\x1b', keep='\n') == 'two\nlines\\x1b'


@pytest.mark.parametrize('count, shown', [
    (35.2e9, '35.2 GFLOP'), (5.04e4, '50.4 kFLOP'), (12, '0.012 kFLOP'), (2e13, '20 TFLOP'),
])
def test_operations_have_a_unit(count, shown):
    assert text.flop(count) == shown


def test_a_cell_is_no_formula():
    assert text.cell('=1+cmd|x') == "'=1+cmd|x"
    assert [text.cell(n) for n in ('-1', '+2.5', 'a=b', 'cat')] == ['-1', '+2.5', 'a=b', 'cat']


def test_json_is_strict_and_exact():
    value = {HOSTILE: [float('nan'), float('inf'), 1.5, (HOSTILE, True)]}
    line = text.to_json(value)
    assert line.isascii() and line.isprintable()

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse) == {HOSTILE: [None, None, 1.5, [HOSTILE, True]]}


def test_columns_are_aligned_to_either_side():
    rows = [('name', 'count', 'x'), ('a', '1,000', ''), ('longer', '7', 'y')]
    assert text.aligned(rows, right=(1,)).split('\n') == [
        'name    count  x', 'a       1,000', 'longer      7  y',
    ]  # fmt: skip
    assert text.aligned(rows[1:]).split('\n')[1] == 'longer  7      y' and text.aligned([]) == ''
