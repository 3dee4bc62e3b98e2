"""Classes of images by their texts, of a checkpoint with an image and a text tower."""

import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.convert import load as weights
from vit_jax.convert import tokenizers
from vit_jax.data import files, prompts
from vit_jax.data.tokenizers import Named
from vit_jax.errors import UserError, shown
from vit_jax.evaluators import zero_shot
from vit_jax.models import interface, layers, pooling
from vit_jax.models.two_towers import TwoTowers, unit_length
from vit_jax.models.vit import Vit
from vit_jax.predict import Predictor

TEXTS = 256  # that are embedded at a time
Drawn = Literal['cosines', 'maps']


def predictor(
    checkpoint: str,
    labels: Sequence[str],
    templates: Sequence[str] = (prompts.PLACE,),
    *,
    tokenizer: str | None = None,
    ema: bool | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    drawn: Drawn | None = None,
) -> Predictor:
    """Loads two towers as a classifier of images into texts.

    Probabilities are of a sigmoid for each text where the model has a bias, as it was then trained
    by that loss (arXiv:2303.15343), else of a softmax over the texts.

    Args:
      checkpoint: as for vit_jax.load.
      labels: the texts.
      templates: texts with a place {} for them; an embedding is the mean over these, see
        `evaluators.zero_shot`.
      tokenizer: address, as for vit_jax.tokenizer. None: that of the checkpoint.
      ema: whether to read the moving average of a run's parameters. None: if the run saved one.
      image_size: pixels per side. None: that of the checkpoint.
      patch_size: pixels per side of a patch. None: that of the checkpoint.
      drawn: whether to predict, in place of probabilities [B, K], {'cosines': [B, K]}, and as
        'maps' [B, K, h, w] those of `patch_embeddings`.

    Raises:
      UserError: the checkpoint has not both towers, or there is one label alone, of which a
        softmax is always 1.
    """
    sizes = dict(image_size=image_size) | ({} if patch_size is None else {'patch_size': patch_size})
    found = weights.read(checkpoint, whole=True, as_input=True, ema=ema, **sizes)
    model = found.model
    if not isinstance(model, TwoTowers):
        raise UserError(
            f'--labels are for a checkpoint with an image and a text tower, and {checkpoint} is of '
            f'a {type(model).__name__}'
        )
    if drawn is None and len(labels) == 1 and not model.use_bias:
        raise UserError(
            f'--labels has {shown(labels[0])} alone, and {checkpoint} compares texts with each '
            'other, so its probability is always 1; add another text'
        )
    if drawn == 'maps' and model.image.pool == 'cls_gap':
        raise UserError(
            f'--maps: the image tower of {checkpoint} pools the class token with the patches '
            "(pool 'cls_gap'), so a patch alone has no embedding; leave out --maps"
        )
    fits = model.text.vocab_size, model.text.length
    named = Named(
        tokenizers.address_of(tokenizer or checkpoint), fits=fits,
        otherwise='' if tokenizer else '--tokenizer names another file or folder of it',
    )  # fmt: skip
    named.check()
    if tokenizer is not None:
        tokenizers.warn_of_another(checkpoint, named)
    classes = class_embeddings(model, found.params, named, labels, templates)

    def compute(params, images):
        out = model.apply({'params': params}, model.normalise(images), None)[1]
        cosines = jnp.matmul(out['image_embedding'], classes.T, precision='highest')
        if drawn is None:
            logits = out['temperature'] * cosines + out['bias']
            return jax.nn.sigmoid(logits) if model.use_bias else jax.nn.softmax(logits)
        if drawn == 'cosines':
            return {'cosines': cosines}
        patches = patch_embeddings(model.image, params['image'], out['image']['encoded'])
        shown = jnp.einsum('bne,ke->bkn', patches, classes, precision='highest')
        grid = model.grid(images.shape[1:])
        maps_of = shown.reshape(*shown.shape[:2], *grid)
        return {'cosines': cosines, 'maps': maps_of}

    size = found.image_size or (files.DEFAULT_SIZE,) * 2
    return Predictor(compute, found.params, size, found.view, tuple(labels))


def is_address(label: str) -> bool:
    """Whether the only label names a file of labels, which need not be there, or known ones."""
    looks = '://' in label or label.startswith('/') or re.fullmatch(r'\S+\.[a-z]{2,5}', label)
    return label in prompts.LABELS or bool(looks) or pathlib.Path(label).is_file()


def check_distinct(labels: Sequence[str]) -> None:
    """Raises UserError if a label is given twice, as each then has half of its probability."""
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise UserError(f'--labels has {shown(label)} {count} times; give it once')


@interface.at_precision
def patch_embeddings(model: Vit, params: Any, encoded: jax.Array) -> jax.Array:
    """Embeddings of patches [B, N, D], each pooled as if it were alone: [B, N, E], unit length.

    What follows the pooling follows here: a norm, a tanh layer, the head. With attention pooling
    the weight of the only token is 1.
    """
    b, n, width = encoded.shape
    x = encoded.reshape(b * n, 1, width)
    if model.pool == 'map':
        x = pooling.map_head(model).apply({'params': params['map_head']}, x)
    else:
        x = x[:, 0]
    if model.last_norm == 'pooled':
        norm = layers.norm(model.style.norm, model.epsilon, model.dtype, None)
        x = norm.apply({'params': params['norm']}, x)
    for name, function in (('pre_logits', jnp.tanh), ('head', lambda x: x)):
        if name in params:
            x = function(x @ params[name]['kernel'] + params[name].get('bias', 0))
    return unit_length(x).reshape(b, n, -1)


def class_embeddings(
    model: TwoTowers, params: Any, tokenizer: Named, labels: Sequence[str],
    templates: Sequence[str],
) -> np.ndarray:  # fmt: skip
    """Embeddings of labels, float32 [K, E]: means over templates, at unit length."""
    ids = tokenizer(prompts.prompts(labels, prompts.templates_of(templates)))

    @jax.jit
    def embed(params, tokens):
        return model.apply({'params': params}, None, tokens)[1]['text_embedding']

    size, parts = min(TEXTS, len(ids)), []
    for start in range(0, len(ids), size):
        some = ids[start : start + size]
        padded = np.pad(some, [(0, size - len(some)), (0, 0)], mode='edge')
        parts.append(np.asarray(embed(params, padded))[: len(some)])
    return zero_shot.of_classes(np.concatenate(parts), len(templates))
