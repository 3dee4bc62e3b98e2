"""Reads JSON files beside weights. They are untrusted, so each value is checked when it is read."""

from typing import NamedTuple

from vit_jax.errors import UserError
from vit_jax.io.text import brief

KINDS = {  # checks of values in JSON files, by their name in error messages
    'anything': lambda v: True,
    'an object': lambda v: isinstance(v, dict),
    'a text': lambda v: isinstance(v, str),
    'a list': lambda v: isinstance(v, list),
    'true or false': lambda v: isinstance(v, bool),
    'a number': lambda v: type(v) in (int, float) and -1e6 < v < 1e6,
    'a number above 0': lambda v: type(v) in (int, float) and 0 < v < 1e6,
    'a whole number': lambda v: type(v) is int and 0 <= v < 2**31,
    'a number of pixels': lambda v: type(v) is int and 0 < v <= 16_384,
    'a whole number above 0': lambda v: type(v) is int and 0 < v < 2**31,
}
PROBLEMS = {  # transformers' problem_type, by the loss that a classifier is trained with
    'softmax': 'single_label_classification', 'sigmoid': 'multi_label_classification',
}  # fmt: skip


class Notes(NamedTuple):
    """What documents leave open, and which of their keys have no effect."""

    guessed: dict = {}  # {field: why}: nothing states its value
    unsettled: dict = {}  # {field: why}: ambiguous, the caller must give the field as a keyword
    ignored: tuple = ()  # (key, why): stated, but without effect here
    unknown: tuple = ()  # keys that this package does not know

    def rows(self, model, given):
        """Rows of the account, without guesses of fields that the caller has `given`."""
        rows = [
            ('guessed', f'{field}={getattr(model, field)!r}', f'{why}; {field}=... settles it')
            for field, why in self.guessed.items() if field not in given
        ]  # fmt: skip
        rows += [('ignored', key, why) for key, why in self.ignored]
        return rows + [('ignored', key, 'a key that is not known here') for key in self.unknown]


def option(config, key, kind, default=None, file='config.json'):
    """A value of a JSON file, or `default` if it is absent or null.

    Raises UserError unless the value is of `kind`, a key of KINDS.
    """
    value = config.get(key)
    if value is None:
        return default
    if not KINDS[kind](value):
        raise UserError(f'{file}: {key} is {brief(repr(value))}, not {kind}')
    return value


def by_channel(config, key, kind, channels, file='config.json'):
    """A number per channel, None if the key is absent; a single float applies to all channels.

    Raises UserError unless each number is of `kind`, a key of KINDS.
    """
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
    """(height, width) from a number of pixels or a pair; None if the key is absent."""
    value = config.get(key)
    if value is None:
        return None
    pair = value if isinstance(value, list) else [value] * 2
    if len(pair) != 2 or not all(map(KINDS['a whole number above 0'], pair)):
        wanted = 'a number of pixels or [height, width]'
        raise UserError(f'{file}: {key} is {brief(repr(value))}, not {wanted}')
    return tuple(pair)


def loss_said(config: dict) -> str | None:
    """The training loss that problem_type in config.json implies; None if that is unknown."""
    return {v: k for k, v in PROBLEMS.items()}.get(str(config.get('problem_type')))


def agree(stated, told, file='config.json'):
    """Raises UserError if a value stated in a JSON file differs from what the arrays imply.

    `stated` and `told` are {key: value}. Keys that are absent from either, or stated as None, are
    not compared.
    """
    for key in stated.keys() & told.keys():
        if stated[key] is not None and stated[key] != told[key]:
            raise UserError(
                f'{file}: {key} is {brief(repr(stated[key]))}, but the arrays have '
                f'{brief(repr(told[key]))}'
            )


def labels(names, count, key, file='config.json'):
    """Class names as a tuple, None without any; raises UserError unless there is one per output."""
    if names is None or not count:
        return None
    if class_names(names) is None or len(names) != count:
        some = f'{len(names)} values' if isinstance(names, (list, dict)) else brief(repr(names))
        raise UserError(f'{file}: {key} has {some}, not a name for each of {count} outputs')
    return tuple(names)


def class_names(values):
    """Class names as a tuple; None unless they are a non-empty list of strings."""
    sound = isinstance(values, (list, tuple)) and all(isinstance(v, str) for v in values)
    return tuple(values) if sound and values else None
