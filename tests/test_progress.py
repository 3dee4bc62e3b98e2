"""Progress: lines of text where there is no terminal."""

import pytest

from vit_jax.io import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand."""
    seconds = [1000.0]
    monkeypatch.setattr(progress.time, 'time', lambda: seconds[0])
    return seconds


def test_lines_are_ten_seconds_apart_with_the_first_and_the_last(clock, capsys):
    with progress.Bar('images', 5000) as bar:
        for _ in range(50):
            bar.add(100)
            clock[0] += 1
        bar.update(5000)
    assert capsys.readouterr().err.splitlines() == [
        'images 100/5,000', *(
            f'images {100 * n:,}/5,000  100 images/s  {50 - n} s left' for n in (11, 21, 31, 41)
        ),
        'images 5,000/5,000  100 images/s  0 s left',
    ]  # fmt: skip


def test_a_brief_bar_says_nothing_of_what_is_soon_over(clock, capsys):
    for seconds in 9, 11:
        with progress.Bar('val', 8, brief=True) as bar:
            bar.add(4)
            clock[0] += seconds
            bar.add(4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('val 8/8')


def test_a_text_of_its_own_a_stream_and_a_silent_bar(clock, capsys):
    for shown in True, False:
        with progress.Bar('step', 3, stream='stdout', shown=shown) as bar:
            bar.update(1, 'loss 2.000')
            bar.print('val: \x1b[31maccuracy')
    out, err = capsys.readouterr()
    assert (out, err) == ('step 1/3  loss 2.000\nval: \\x1b[31maccuracy\n', '')


@pytest.mark.parametrize('total, lines', [
    (4_000_000, ['a.npz 2,000,000/4,000,000 bytes  0.2 MB/s  10 s left']),
    (None, ['a.npz 2,000,000 bytes  0.2 MB/s']),
])  # fmt: skip
def test_bytes_have_a_rate_and_perhaps_no_total(clock, capsys, total, lines):
    with progress.Bar('a.npz', total, unit='bytes', brief=True) as bar:
        bar.update(0)
        clock[0] += 10
        bar.update(2_000_000)
    assert capsys.readouterr().err.splitlines() == lines
