"""What JSON files beside weights say: untrusted too, so each value is checked when it is read."""

import json
import os
import stat

from vit_jax.convert.files import MOST_HEADER, brief
from vit_jax.errors import UserError

KINDS = {  # of values in JSON files, by what a message calls them
    'an object': lambda v: isinstance(v, dict),
    'a text': lambda v: isinstance(v, str),
    'a list': lambda v: isinstance(v, list),
    'a number': lambda v: type(v) in (int, float) and -1e6 < v < 1e6,
    'a number above 0': lambda v: type(v) in (int, float) and 0 < v < 1e6,
    'a whole number above 0': lambda v: type(v) is int and 0 < v < 2**31,
}


PROBLEMS = {  # transformers' problem_type, by the loss that a classifier is trained with
    'softmax': 'single_label_classification', 'sigmoid': 'multi_label_classification',
}  # fmt: skip


def read_json(path):
    """The object in a file, {} where there is none."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_HEADER:
            raise UserError(f'{path} is no file of less than {MOST_HEADER:,} bytes')
        value = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise UserError(f'can not read {path}: {e.strerror or e}') from e
    except UserError:
        raise
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is no JSON file ({brief(e)})') from e
    if not isinstance(value, dict):
        raise UserError(f'{path} is no JSON object')
    return value


def option(config, key, kind, default=None, file='config.json'):
    """A value of a JSON file, the default where it is absent or null; UserError for a wrong one."""
    value = config.get(key)
    if value is None:
        return default
    if not KINDS[kind](value):
        raise UserError(f'{file}: {key} is {brief(repr(value))}, not {kind}')
    return value


def by_channel(config, key, kind, channels, file='config.json'):
    """A number for each channel, None where the JSON file has none; one number is that of all."""
    values = config.get(key)
    if values is None:
        return None
    values = [values] * channels if isinstance(values, float) else values
    sound = isinstance(values, list) and len(values) == channels and all(map(KINDS[kind], values))
    if not sound:
        wanted = f'{kind} for each of {channels} channels'
        raise UserError(f'{file}: {key} is {brief(repr(values))}, not {wanted}')
    return tuple(map(float, values))


def size_option(config, key, file='config.json'):
    """(height, width) of a number of pixels or a pair, None where the JSON file has none."""
    value = config.get(key)
    if value is None:
        return None
    pair = value if isinstance(value, list) else [value] * 2
    if len(pair) != 2 or not all(map(KINDS['a whole number above 0'], pair)):
        wanted = 'a number of pixels or [height, width]'
        raise UserError(f'{file}: {key} is {brief(repr(value))}, not {wanted}')
    return tuple(pair)


def loss_said(config: dict) -> str | None:
    """The loss of a classifier by its problem_type in config.json, None where that is unknown."""
    return {v: k for k, v in PROBLEMS.items()}.get(str(config.get('problem_type')))


def class_names(values):
    """Class names as a tuple, None where they are no list of strings."""
    sound = isinstance(values, (list, tuple)) and all(isinstance(v, str) for v in values)
    return tuple(values) if sound and values else None
