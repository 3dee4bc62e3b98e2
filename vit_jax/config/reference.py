"""Makes the reference of all settings, in Markdown: key, type, range, default and meaning of each.

Types, ranges and defaults are those of the signatures. Meanings are the `Args:` of the docstrings
and, for the fields of a model, the comments above or beside them.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vit_jax import config, models, optim
from vit_jax.config import keys
from vit_jax.config.sections import REQUIRED, keys_of
from vit_jax.data import augment, distort, mixture, pipeline, sources
from vit_jax.io import bounds, experiment

INHERITED = object()  # the default of an evaluation's keys in config.INHERITED
START = """\
# Settings of an experiment

`python -m vit_jax.config` prints this page. An experiment file returns these settings as nested
dicts (ConfigDict); `--config.optim.lr=3e-4` changes one on the command line. An unknown key and a
value of another type or out of range are errors that name the key. The training method, the task
and the type of an evaluation may be your own, with settings of their own: see
[extending](extending.md).
"""
OPTIMIZER = (  # what documents arguments of optim.make
    optim.update_rule, optim.make_schedule, optim.decay_strengths, optim.decay_factor,
    optim.rate_multipliers,
)  # fmt: skip
MODELS = {  # {model whose defaults are shown: text}
    'vit-b/16': """\
Vision Transformers and hybrids, named `vit-SIZE/PATCH`, `rUNITS+vit-SIZE/PATCH`, or `vit/PATCH`
with the size given by fields. The defaults are those of `vit-b/16`; the name sets `patch_size`,
`width`, `depth`, `num_heads`, `mlp_dim` and `resnet`.""",
    'text-b': """\
The same transformer on words, named `text-SIZE`, or `text` with the size given by fields. The
defaults are those of `text-b`; the name sets `width`, `depth`, `num_heads` and `mlp_dim`.""",
    'mixer-b/16': """\
MLP-Mixer, named `mixer-SIZE/PATCH`. The defaults are those of `mixer-b/16`; the name sets
`patch_size`, `width`, `depth`, `tokens_mlp_dim` and `mlp_dim`.""",
    'bit-r50x1': """\
ResNets of BiT, named `bit-rDEPTHxWIDTH`, or `bit` with `units` given. The defaults are those of
`bit-r50x1`; the name sets `units` and `width`.""",
}


class Section(NamedTuple):
    """A heading with a text and the settings below it."""

    level: int
    title: str
    text: str
    keys: dict[str, tuple[Any, Any]]  # as `keys_of` gives them
    meanings: dict[str, str]


def arguments(docstring: str) -> dict[str, str]:
    """{argument: meaning} from the section `Args:` of a docstring; 'a, b: text' is for both."""
    _, _, section = docstring.partition('\nArgs:\n')
    section = re.split(r'^\S', section, maxsplit=1, flags=re.M)[0]
    entries = re.findall(r'^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)', section, re.M)
    return {name: ' '.join(text.split()) for names, text in entries for name in names.split(', ')}


def fields(module: type) -> dict[str, str]:
    """{field: meaning} of a flax module from the comments above or beside its fields.

    A dataclass that is made of another has that as `documented_by`.
    """
    module = getattr(module, 'documented_by', module)
    pattern = r'^((?:    # .*\n)*)    (\w+): [^#\n]+(?:  # (.*))?$'
    found = re.findall(pattern, inspect.getsource(module), re.M)
    return {
        name: ' '.join(above.replace('#', ' ').split() + ([beside] if beside else []))
        for above, name, beside in found
    }


def flattened(known: dict, meanings: dict) -> tuple[dict, dict]:
    """Both with a row for each field of a group of settings: 'style.norm'."""
    rows, texts = {}, dict(meanings)
    for name, (kind, default) in known.items():
        group = bounds.group_of(kind)
        if group is None:
            rows[name] = kind, default
            continue
        if type(None) in typing.get_args(kind):
            rows[name] = kind, default
        inner = {f.name: (f.type, bounds.section(f.default)) for f in dataclasses.fields(group)}
        inner, about = flattened(inner, fields(group))
        rows |= {f'{name}.{key}': row for key, row in inner.items()}
        texts |= {f'{name}.{key}': text for key, text in about.items()}
    return rows, texts


def introduction(function: Callable) -> str:
    """A docstring without its sections `Args:`, `Returns:` and the like."""
    return re.split(r'\n+(?:Args|Attributes|Returns|Raises|Yields):\n', inspect.getdoc(function))[0]


def of_model(name: str, text: str) -> Section:
    """Makes the Section of the fields of a model, those within groups included."""
    module, _ = models.parts(name)
    known = {k: v for k, v in models.fields(name).items() if k not in keys_of(keys.model)}
    return Section(3, name.partition('-')[0], text, *flattened(known, fields(module)))


def of(level: int, title: str, function: Callable, *others: Callable) -> Section:
    """Makes the Section of a function's settings, together with those of `others`."""
    known, meanings = {}, {}
    for one in (*others, function):
        known |= keys_of(one)
        meanings |= arguments(inspect.getdoc(one))
    known.pop('size', None)  # of a view: the task's image_size
    return Section(level, title, introduction(function), known, meanings)


def components(kind: str) -> Iterator[tuple[str, Callable]]:
    """Yields (name, function) of the package's own functions of a kind in config.ROOMS."""
    for name, found in experiment.package_components(config.ROOMS[kind][0]).items():
        yield name, found.function


def sections() -> Iterator[Section]:
    """Yields all sections in their order."""
    yield of(2, 'Top level', keys.scalars)
    yield of(3, 'expected', keys.expectation)
    yield of(2, 'model', keys.model)
    for name, text in MODELS.items():
        yield of_model(name, text)
    yield of(2, 'data', keys.data)
    for name, function in components('data.task'):
        yield of(3, f"task='{name}'", function)
    yield of(3, 'Batches', pipeline.batches)
    yield of(3, 'Data sets', sources.load)
    yield of(3, 'Mixtures', mixture.load, keys.mixture_part)
    yield Section(3, 'Views', "By name, or with settings: `dict(name='resize', crop=0.9)`.", {}, {})
    for name, function in augment.VIEWS.items():
        yield of(4, name, function)
    yield Section(3, 'Augmentations', "Likewise: `dict(name='erase', fill='black')`.", {}, {})
    for name, function in distort.AUGMENTATIONS.items():
        yield of(4, name, function)
    yield of(2, 'objective', keys.objective)
    for name, function in components('objective.name'):
        yield of(3, f"name='{name}'", function)
    yield of(2, 'optim', optim.make, *OPTIMIZER)._replace(keys=keys_of(optim.make))
    yield of(2, 'evals', keys.evaluation)
    for name, function in components('evals.type'):
        found = of(3, f"type='{name}'", function)
        known = {k: (found.keys[k][0], INHERITED) for k in config.INHERITED if k in found.keys}
        yield found._replace(keys=found.keys | known)
    for name, function in config.SECTIONS.items():
        if name != 'optim':
            yield of(2, name, function)
    yield of(2, 'select', keys.select)


def markdown() -> str:
    """The whole page."""
    parts = [START]
    for level, title, text, known, meanings in sections():
        parts.append(f'{"#" * level} {title}\n\n{text}\n')
        if known:
            rows = [('Key', 'Type', 'Default', 'Meaning'), ('---',) * 4]
            for key, (annotation, default) in known.items():
                meaning = sentence(meanings.get(key, ''))
                rows.append((f'`{key}`', bounds.describe(annotation), shown(default), meaning))
            parts.append(''.join(f'| {" | ".join(map(cell, row))} |\n' for row in rows))
    return '\n'.join(parts)


def shown(default: Any) -> str:
    """Formats a default as in an experiment file."""
    if default is INHERITED:
        return 'that of `data`'
    return 'required' if default is REQUIRED else f'`{default!r}`'


def sentence(text: str) -> str:
    """Makes text begin with a capital letter and end with a full stop."""
    return text[:1].upper() + text[1:].removesuffix('.') + '.'


def cell(text: str) -> str:
    """Escapes text for a cell of a table."""
    return text.replace('|', r'\|')
