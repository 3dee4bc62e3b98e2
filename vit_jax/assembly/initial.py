"""The state at the first step of a run: random, or with the weights of `init_from`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from vit_jax import assembly, models, step
from vit_jax.assembly import differences
from vit_jax.convert import load as weights
from vit_jax.convert import run, tokenizers
from vit_jax.convert.stages import Values
from vit_jax.errors import UserError
from vit_jax.models import parameters
from vit_jax.models.text import Text
from vit_jax.models.two_towers import TwoTowers

OF_HEAD = ('name', 'num_classes', 'representation_size')  # what another head changes
Weights = tuple[dict[str, jax.Array], list[tuple[str, str, str]]]  # by name, and their account


def first_state(config: ConfigDict, parts: assembly.Parts) -> tuple[step.State, str | None]:
    """The state at step 0, random or from `init_from`, and a table of what was loaded, or None.

    Of a method that keeps the model in a subtree of its parameters, the others are random. Two
    towers begin with both of a checkpoint, or with its image tower alone.
    """
    if config.init_from is None:
        fresh = (parts.objective, parts.tx, config.seed, parts.abstract)
        return step.init(*fresh), None
    names = parameters.named_leaves(parts.abstract.params)
    own, account = begun(config, parts, names, True)
    if len(own) < len(names):
        random = step.random_params(parts.objective, config.seed, parts.abstract)
        account += [
            ('re-initialised', name, 'at random: beside the model')
            for name in sorted(names.keys() - own)
        ]
        own = parameters.named_leaves(random) | own
    params = unflatten_dict(own, sep='/')
    state = step.begin(params, parts.objective, parts.tx, parts.abstract)
    return state, weights.format_account(account)


def is_here(address: str) -> bool:
    """Whether a checkpoint is on this machine, or is a run on gs://; it may be damaged.

    Raises UserError for what resembles a name of the catalogue.
    """
    address = weights.split_tower(weights.resolve(address))[0]
    if '://' in address:
        return run.is_run(address)
    return os.path.exists(os.path.expanduser(address)) or run.is_run(address)


def check(config: ConfigDict, parts: assembly.Parts) -> None:
    """Raises UserError unless `first_state` can take the weights of `init_from`, whose values it
    does not read.
    """
    names = parameters.named_leaves(parts.abstract.params)
    begun(config, parts, names, 'shapes')


def begun(
    config: ConfigDict, parts: assembly.Parts, names: dict[str, Any], values: Values
) -> Weights:
    """Weights of `init_from` for those of the run's parameters {name: array} that it has."""
    if parts.model is None:
        raise UserError(
            f'init_from is {config.init_from}, but objective {config.objective.name} has a network '
            'of its own, whose parameters no checkpoint of a model has'
        )
    both = {'image', 'text'} <= {name.split('/')[0] for name in names}
    read = of_towers if both else of_text if isinstance(parts.model, Text) else of_images
    return read(config, parts, names, values)


def of_images(
    config: ConfigDict, parts: assembly.Parts, names: dict[str, Any], values: Values
) -> Weights:
    """Weights of a model of images, with a head of zeros unless `keep_head`."""
    size, subject = image_size(config, parts), subject_of(config)
    prefix = run.only_prefix(parts.model, size, names, subject)
    classes = names[f'{prefix}head/bias'].shape[0] if f'{prefix}head/bias' in names else 0
    if not run.is_run(config.init_from):  # whose parameters would be read twice
        stated = weights.read(config.init_from, part='encoder', ema=None, values=False).model
        differences.warn(config.init_from, stated, parts.model, 'model')
    with explained(config, lambda: differing_images(config, parts)):
        found = weights.read(
            config.init_from, part='encoder', ema=None, image_size=size, values=values,
            num_classes=None if config.keep_head and classes else classes,
            keep_pre_logits=config.keep_pre_logits, **fields_of(parts.model),
        )  # fmt: skip
        return checked(config, names, prefix, found)


def differing_images(config: ConfigDict, parts: assembly.Parts) -> str:
    """Settings by which the model of images has other parameters than that of `init_from`."""
    stated = weights.read(config.init_from, part='encoder', ema=None, values=False).model
    return differences.of_structure(stated, parts.model, 'model')


def of_text(
    config: ConfigDict, parts: assembly.Parts, names: dict[str, Any], values: Values
) -> Weights:
    """Weights of a text tower, with a head of zeros unless `keep_head`."""
    prefix = next(n.removesuffix('vocabulary') for n in names if n.endswith('vocabulary'))
    classes = names[f'{prefix}head/bias'].shape[0] if f'{prefix}head/bias' in names else 0
    stated = weights.read(config.init_from, part='text', ema=None, values=False).model
    differences.warn(config.init_from, stated, parts.model, 'model')
    tokenizers.warn_of_another(config.init_from, parts.task.tokenizer)
    with explained(config, lambda: differences.of_structure(stated, parts.model, 'model')):
        found = weights.read(
            config.init_from, part='text', ema=None, values=values,
            num_classes=None if config.keep_head and classes else classes,
            **fields_of(parts.model),
        )  # fmt: skip
        return checked(config, names, prefix, found)


def of_towers(
    config: ConfigDict, parts: assembly.Parts, names: dict[str, Any], values: Values
) -> Weights:
    """Weights of both towers, of which each scalar is optional, or of the image tower alone."""
    options = dict(ema=None, image_size=image_size(config, parts), values=values)
    options |= fields_of(parts.model)
    whole = weights.read(config.init_from, ema=None, towers=True, values=False).model
    if isinstance(whole, Text):
        raise UserError(
            f'init_from is {config.init_from}, a model of texts alone; two towers begin with both '
            'of a checkpoint or with its image tower'
        )
    if not isinstance(whole, TwoTowers):
        with explained(config, lambda: differing_images(config, parts)):
            found = weights.read(config.init_from, part='encoder', num_classes=0, **options)
            bodies = {n: x for n, x in names.items() if not n.startswith('image/head/')}
            return checked(config, bodies, 'image/', found)
    words = differences.text_of(config.objective.get('text') or {}, names, 'text/')
    both = (whole.image, parts.model, 'model'), (whole.text, words, 'objective.text')
    for pair in both:
        differences.warn(config.init_from, *pair)
    tokenizers.warn_of_another(config.init_from, parts.task.tokenizer)
    with explained(config, lambda: '; '.join(
        text for pair in both if (text := differences.of_structure(*pair, head=True))
    )):  # fmt: skip
        found = weights.read(config.init_from, towers=True, **options)
        scalars = {'temperature', 'bias'}
        own = {
            name: x for name, x in parameters.named_leaves(found.params).items()
            if name in names or name not in scalars
        }  # fmt: skip
        wanted = {name: x for name, x in names.items() if name in own or name not in scalars}
        parameters.check_same(own, wanted, config.init_from)
        return own, list(found.account)


@contextlib.contextmanager
def explained(config: ConfigDict, differing: Callable[[], str]) -> Iterator[None]:
    """Names in an error the settings that make the weights of `init_from` unfit, if any do."""
    try:
        yield
    except UserError as e:
        try:
            settings = differing()
        except UserError:  # the file is damaged
            settings = ''
        if not settings:
            raise
        raise UserError(
            f'init_from is {config.init_from}, whose weights do not fit this model: {settings}'
        ) from e


def image_size(config: ConfigDict, parts: assembly.Parts) -> tuple[int, int]:
    """Size of the images that the positions of the run are for."""
    if config.objective.get('patch_sides'):  # whose positions are a table of their own
        return tuple(config.objective.patch_grid * n for n in parts.model.patch_size)
    return parts.inputs['image'].shape[:2]


def subject_of(config: ConfigDict) -> str:
    """The run, for a message."""
    return f'init_from is {config.init_from}, but objective {config.objective.name}'


def fields_of(model: Any) -> dict[str, Any]:
    """{field: value} of a model but those of its head."""
    return {k: v for k, v in models.describe(model).items() if k not in OF_HEAD}


def checked(config: ConfigDict, names: dict[str, Any], prefix: str, found: Any) -> Weights:
    """The weights with a prefix; raises UserError unless they are those of `names` that have it."""
    own = {f'{prefix}{name}': x for name, x in parameters.named_leaves(found.params).items()}
    inside = {name: x for name, x in names.items() if name.startswith(prefix)}
    parameters.check_same(own, inside, config.init_from)
    return own, list(found.account)
