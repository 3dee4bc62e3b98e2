"""What JSON files beside weights say: untrusted too, so each value is checked when it is read."""

from typing import NamedTuple

from vit_jax.errors import UserError
from vit_jax.io.text import brief

KINDS = {  # of values in JSON files, by what a message calls them
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
    """What documents leave open, beside the fields that are read of them."""

    guessed: dict = {}  # {field: why}: nothing states its value
    unsettled: dict = {}  # {field: why}: without the field as a keyword there is no model
    ignored: tuple = ()  # (key, why): what is stated and has no effect here
    unknown: tuple = ()  # keys that nobody here knows

    def rows(self, model, given):
        """Rows of an account; a guess that a keyword in `given` has settled is none."""
        rows = [
            ('guessed', f'{field}={getattr(model, field)!r}', f'{why}; {field}=... settles it')
            for field, why in self.guessed.items() if field not in given
        ]  # fmt: skip
        rows += [('ignored', key, why) for key, why in self.ignored]
        return rows + [('ignored', key, 'a key that is not known here') for key in self.unknown]


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


def agree(stated, told, file='config.json'):
    """Raises UserError where a value that a JSON file states is not the one that the arrays tell.

    Both are {key: value}; what is absent from either, or stated as None, is not compared.
    """
    for key in stated.keys() & told.keys():
        if stated[key] is not None and stated[key] != told[key]:
            raise UserError(
                f'{file}: {key} is {brief(repr(stated[key]))}, but the arrays have '
                f'{brief(repr(told[key]))}'
            )


def labels(names, count, key, file='config.json'):
    """Class names as a tuple, None of none; UserError unless there is one for each output."""
    if names is None or not count:
        return None
    if class_names(names) is None or len(names) != count:
        some = f'{len(names)} values' if isinstance(names, (list, dict)) else brief(repr(names))
        raise UserError(f'{file}: {key} has {some}, not a name for each of {count} outputs')
    return tuple(names)


def class_names(values):
    """Class names as a tuple, None where they are no list of strings."""
    sound = isinstance(values, (list, tuple)) and all(isinstance(v, str) for v in values)
    return tuple(values) if sound and values else None
