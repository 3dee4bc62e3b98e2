"""Masked language modelling (arXiv:1810.04805 section 3.1), the twin of `masked_patch` for words.

A batch is {text: int [B, L], mask: [B]}. Shapes: C tokens that are predicted, D width, V
vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.io.bounds import Share
from vit_jax.models.text import Text
from vit_jax.objectives import Examples, Objective, corruption, masked_mean

METRICS = {'loss': 'min', 'accuracy': 'max'}
WORDS = 0x776F72  # folded into the key for the words that replace others
RULES = ((r'vocabulary_bias', P('tensor')),)


def mlm(model: nn.Module, examples: Examples, *, corrupt: Share = 0.15) -> Objective:
    """Predicts corrupted tokens from the others, by products with the embedding of each token.

    Of the corrupted tokens, 80% are replaced by the tokenizer's mask, 10% by a random token and 10%
    are kept; the shares are those of each text, up to one token, and exact on average. Padding and
    the tokens that begin and end a text are neither corrupted nor predicted. Parameters of the text
    tower are in the subtree `text`, beside a bias for each token.

    Args:
      model: a text tower, as `models.build` makes it (`text-b`); its head is left out.
      examples: the training examples, with `text` in the spec and the tokenizer, as of the task
        `text`.
      corrupt: share of the tokens of a text that are corrupted.
    """
    tokenizer = checked(model, examples)
    model = model.clone(num_classes=None)
    (length,) = examples.spec['text'].shape
    most = min(int(length * corrupt) + 1, length)
    special = [getattr(tokenizer, name) for name in ('pad', 'bos', 'eos', 'mask')]
    special = jnp.array([token for token in special if token is not None])

    def init(key):
        blank = jnp.zeros((1, length), jnp.int32)
        params = model.init(key, blank)['params']
        return {'text': params, 'vocabulary_bias': jnp.zeros(model.vocab_size)}

    def loss_fn(params, extra, frozen, batch, key, step):
        words, mask = batch['text'], batch['mask'].astype(jnp.float32)
        kinds, _ = corruption.draw(key, words.shape, corrupt, ~jnp.isin(words, special))
        random = jax.random.randint(
            jax.random.fold_in(key, WORDS), words.shape, 0, tokenizer.vocab_size
        )
        read = jnp.where(kinds == 0, tokenizer.mask, jnp.where(kinds == 1, random, words))
        _, out = model.apply(
            {'params': params['text']}, read, train=True, rngs={'dropout': key}
        )
        places = jnp.argsort(kinds, axis=1)[:, :most]  # [B, C], the corrupted ones first
        x = jnp.take_along_axis(out['encoded'], places[:, :, None], axis=1)
        logits = model.apply({'params': params['text']}, x, method='logits_of_tokens')
        logits = logits.astype(jnp.float32) + params['vocabulary_bias']
        wanted, kinds = (jnp.take_along_axis(x, places, axis=1) for x in (words, kinds))
        own = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        each = {
            'loss': jax.nn.logsumexp(logits, axis=-1) - own,
            'accuracy': jnp.argmax(logits, axis=-1) == wanted,
        }
        weights = (kinds < 3).astype(jnp.float32)
        mask = mask * jnp.any(weights > 0, axis=1)
        means = {n: masked_mean(corruption.of_each(x, weights), mask) for n, x in each.items()}
        return means['loss'], (means, {})

    def predict(params, batch):
        return model.apply({'params': params['text']}, batch['text'])[1]

    flops = model.flops(length) + 2 * most * model.width * model.vocab_size
    return Objective(init, loss_fn, predict, rules=RULES, flops=flops)


def checked(model: nn.Module, examples: Examples) -> Any:
    """The tokenizer; raises UserError for a model or examples of another kind."""
    if not isinstance(model, Text):
        raise UserError(
            "objective mlm trains a text tower, as model.name 'text-b'; the model is a "
            f'{type(model).__name__}'
        )
    if 'text' not in examples.spec or examples.tokenizer is None:
        raise UserError("objective mlm trains on texts; set data.task to 'text'")
    tokenizer = examples.tokenizer.loaded
    if tokenizer.mask is None:
        raise UserError(
            'objective mlm needs a tokenizer with a mask token, as python -m '
            'vit_jax.data.tokenizers makes them'
        )
    if model.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f'model.vocab_size is {model.vocab_size}, and the tokenizer has '
            f'{tokenizer.vocab_size} tokens'
        )
    if model.causal:
        raise UserError('objective mlm predicts tokens from both sides; model.causal is False')
    return tokenizer
