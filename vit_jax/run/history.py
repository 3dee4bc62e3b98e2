"""Reads and writes the metrics of a run: metrics.jsonl and the scores of its checkpoints.

Damage to either is tolerated: unreadable lines or files are reported on stderr and skipped, and
each contains what the other may have lost about the best checkpoint.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping

from etils import epath

from vit_jax.io import storage
from vit_jax.io.text import printable, to_json

SCORES = 'scores.json'  # in the folder `checkpoints`: {step: {metric: value}}


def read_lines(workdir: os.PathLike | str) -> list[dict]:
    """Reads the lines of a run's metrics.jsonl as dicts, see `read_file`."""
    return read_file(epath.Path(workdir) / 'metrics.jsonl')


def read_file(path: epath.Path) -> list[dict]:
    """Reads a file in the format of metrics.jsonl; reports damaged lines and skips them."""
    lines, damaged = split_lines(storage.read(path) or b'')
    report_damaged(path, damaged)
    return lines


def split_lines(data: bytes) -> tuple[list[dict], dict[int, bytes]]:
    """(lines as dicts, {number: bytes} of damaged lines) from the bytes of a file.

    Text after the last newline, where a kill may have truncated a line, counts if it is complete.
    """
    lines, damaged = [], {}
    rows = data.split(b'\n')
    for number, row in enumerate(rows, 1):
        line = parse_line(row)
        if line is not None:
            lines.append(line)
        elif row.strip() and number < len(rows):
            damaged[number] = row
    return lines, damaged


def parse_line(row: bytes) -> dict | None:
    """Parses a line of metrics; None if it is not one."""
    try:
        line = json.loads(row)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get('step')) is not int or line['step'] < 0:
        return None
    return line if all(v is None or is_number(v) for v in line.values()) else None


def is_number(value: object) -> bool:
    """Whether a value of JSON is a number of at most 64 bits."""
    return type(value) is float or type(value) is int and abs(value) < 2**63


def report_damaged(path: epath.Path, damaged: Mapping[int, bytes]) -> None:
    """Reports damaged lines of a file on stderr."""
    if damaged:
        numbers = ', '.join(map(str, list(damaged)[:10])) + (', ...' if len(damaged) > 10 else '')
        message = f'{path}: {len(damaged)} damaged lines are left out: {numbers}'
        print(printable(message), file=sys.stderr, flush=True)


def set_aside(path: epath.Path, damaged: Mapping[int, bytes]) -> None:
    """Appends damaged lines to a separate file, before `path` is rewritten."""
    if damaged:
        aside = path.with_name(path.name + '.damaged')
        rows = b''.join(row + b'\n' for row in damaged.values())
        storage.write(aside, (storage.read(aside) or b'') + rows)


def has_lost(workdir: os.PathLike | str) -> bool:
    """Whether lines of a run's metrics.jsonl are or were damaged."""
    path = epath.Path(workdir) / 'metrics.jsonl'
    return path.with_name(path.name + '.damaged').exists() or bool(
        split_lines(storage.read(path) or b'')[1]
    )


def read_scores(checkpoints: epath.Path) -> dict[int, dict[str, float | None]]:
    """Reads {step: {metric: value}} from a folder of checkpoints; {} if absent or damaged."""
    path = checkpoints / SCORES
    data = storage.read(path)
    if data is None:
        return {}
    try:
        scores = {int(step): dict(values) for step, values in json.loads(data).items()}
        if all(v is None or is_number(v) for values in scores.values() for v in values.values()):
            return scores
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    print(printable(f'{path} is damaged and left out'), file=sys.stderr, flush=True)
    return {}


def write_scores(checkpoints: epath.Path, scores: Mapping[int, Mapping]) -> None:
    """Writes {step: {metric: value}} into a folder of checkpoints."""
    storage.write(checkpoints / SCORES, (to_json(scores) + '\n').encode())


def scores_of(workdir: os.PathLike | str, metric: str) -> dict[int, float]:
    """{step: value} of an evaluation's metric, from metrics.jsonl and the scores."""
    scores = {line['step']: line[metric] for line in read_lines(workdir) if metric in line}
    for step, values in read_scores(epath.Path(workdir) / 'checkpoints').items():
        if metric in values:
            scores[step] = values[metric]
    return {step: value for step, value in scores.items() if value is not None}


def best(steps: Iterable[int], scores: Mapping[int, float], *, largest: bool) -> int | None:
    """The step with the best score, the first of equals; None if none has a finite score."""
    scored = [s for s in sorted(steps) if math.isfinite(scores.get(s, math.nan))]
    return (max if largest else min)(scored, key=scores.get) if scored else None
