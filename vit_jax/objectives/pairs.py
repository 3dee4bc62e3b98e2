"""Losses of all pairs of images and texts in a batch, of which no device has all logits.

Each device compares its own images with its own texts, then passes the texts, and what it has
summed for them, to the next device, until they are back. So it has [b, b] logits at a time, in the
forward pass and, computed again, in the backward pass.

Shapes: B global batch, n devices that split it, b = B / n, D size of an embedding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp')  # mesh axes that split a batch
LOWEST = -1e30  # logit of a pair that does not count


class Pairs(NamedTuple):
    """What a loss reads; embeddings have unit length, pair i is image i with text i."""

    image: jax.Array  # float32 [B, D]
    text: jax.Array  # float32 [B, D]
    scale: jax.Array  # [], multiplies cosines: the inverse of the temperature
    bias: jax.Array  # [], added to the logits
    mask: jax.Array  # float32 [B], 0 for pairs that do not count


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def loss(pairs: Pairs, kind: str) -> tuple[jax.Array, jax.Array]:
    """(loss, accuracy): means over the images whose mask is 1, 0 if there is none.

    On a mesh whose axes AXES have n devices, no device ever has more than [B / n, B / n] logits,
    neither for the loss nor for its gradients. Products are float32.

    Args:
      pairs: embeddings, scale, bias and mask.
      kind: 'sigmoid': the sum over texts of binary cross-entropies (arXiv:2303.15343 eq. 1), or
        'softmax': the mean of cross-entropies of an image over texts and of a text over images
        (arXiv:2103.00020 figure 3), which the bias does not change.

    Returns:
      The loss and the share of images with no text of a greater logit than their own.
    """
    return forward(pairs, kind)[0]


def forward(pairs: Pairs, kind: str) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    """((loss, accuracy), what the gradient reads)."""
    function = partial(KINDS[kind][0], AXES if meshed() else ())
    result, sums = on_each_device(function, (P(), P(AXES)))(pairs)
    return result, (pairs, sums)


def backward(kind: str, saved: tuple, cotangents: tuple) -> tuple[Pairs]:
    """Gradients of `pairs`; the accuracy has none."""
    pairs, sums = saved
    function = partial(KINDS[kind][1], AXES if meshed() else ())
    places = Pairs(P(AXES), P(AXES), P(), P(), P(AXES))
    gradients = on_each_device(function, places, also=P(AXES))(pairs, sums)
    return (jax.tree.map(lambda x: x * cotangents[0], gradients),)


loss.defvjp(forward, backward)


def meshed() -> bool:
    """Whether a mesh is set that splits batches."""
    return set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)


def on_each_device(function: Callable, results: Any, also: Any = None) -> Callable:
    """Maps the function of (pairs, what follows) over devices, each with its own rows."""
    if not meshed():
        return function
    arguments = (Pairs(P(AXES), P(AXES), P(), P(), P(AXES)),) + (() if also is None else (also,))
    return jax.shard_map(function, in_specs=arguments, out_specs=results, check_vma=False)


def ring(function: Callable, axes: tuple[str, ...], carry: Any, chunk: Any) -> tuple[Any, Any]:
    """Folds (carry, chunk, own) -> (carry, chunk) over the chunks of all devices.

    A chunk goes to the next device after each; in the end it is where it began. `own` is true for
    the device's own chunk, the first.
    """
    count = lax.axis_size(axes) if axes else 1
    if count == 1:
        return function(carry, chunk, True)
    following = [(i, (i + 1) % count) for i in range(count)]

    def body(state, i):
        carry, chunk = function(*state, i == 0)
        return (carry, jax.tree.map(lambda x: lax.ppermute(x, axes, following), chunk)), None

    return lax.scan(body, (carry, chunk), jnp.arange(count))[0]


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in float32 on any device."""
    return jnp.matmul(a, b, precision='highest')


def cosines(pairs: Pairs, text: jax.Array, own: jax.Array | bool) -> tuple[jax.Array, jax.Array]:
    """(cosines of the device's images with a chunk of texts [b, b], which are pairs [b, b])."""
    return product(pairs.image, text.T), jnp.eye(len(text), dtype=bool) & own


def total(axes: tuple[str, ...], values: Any) -> Any:
    """Sums a tree over all devices."""
    return lax.psum(values, axes) if axes else values


def count(axes: tuple[str, ...], mask: jax.Array) -> jax.Array:
    """Number of pairs that count, at least 1."""
    return jnp.maximum(total(axes, jnp.sum(mask)), 1)


def counted(pairs: Pairs, mask: jax.Array) -> jax.Array:
    """1 where both image and text count, [b, b]; `mask` is that of the texts."""
    return pairs.mask[:, None] * mask


def ranks(state: tuple, cosine: jax.Array, true: jax.Array, mask: jax.Array) -> tuple:
    """(highest cosine, own cosine) [b] of images, with those of a chunk of texts."""
    highest, own = state
    highest = jnp.maximum(highest, jnp.max(jnp.where(mask > 0, cosine, LOWEST), axis=1))
    return highest, own + jnp.sum(jnp.where(true, cosine, 0), axis=1)


def hits(pairs: Pairs, ranked: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Number of images with no text of a greater cosine than their own, from `ranks`."""
    highest, own = ranked
    return jnp.sum(pairs.mask * (own >= highest))


def sigmoid_forward(axes: tuple[str, ...], pairs: Pairs) -> tuple[tuple, tuple]:
    """((loss, accuracy), ()) of a device's images."""

    def step(carry, chunk, own):
        (value, ranked), (text, mask) = carry, chunk
        cosine, true = cosines(pairs, text, own)
        logits = cosine * pairs.scale + pairs.bias
        losses = jax.nn.softplus(jnp.where(true, -logits, logits))
        value += jnp.sum(counted(pairs, mask) * losses)
        return (value, ranks(ranked, cosine, true, mask)), chunk

    zeros = jnp.zeros(len(pairs.image))
    start = jnp.float32(0), (zeros + LOWEST, zeros)
    (value, ranked), _ = ring(step, axes, start, (pairs.text, pairs.mask))
    value, right = total(axes, (value, hits(pairs, ranked)))
    number = count(axes, pairs.mask)
    return (value / number, right / number), ()


def sigmoid_backward(axes: tuple[str, ...], pairs: Pairs, sums: tuple) -> Pairs:
    """Gradients of the mean loss; those of scale and bias are sums over all devices."""

    def logit_gradients(logits, true, mask, _):
        slope = jnp.where(true, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
        return counted(pairs, mask) * slope

    return gradients(axes, pairs, logit_gradients, ())


def gradients(axes: tuple[str, ...], pairs: Pairs, slopes: Callable, columns: tuple) -> Pairs:
    """Gradients of pairs for a mean over images, a chunk of texts after another.

    Args:
      axes: mesh axes that split the batch.
      pairs: those of the device.
      slopes: (logits [b, b], which are pairs, mask of the texts, columns) -> gradients of the sum
        by the logits, [b, b].
      columns: arrays [b] that go with the texts.
    """
    number = count(axes, pairs.mask)

    def step(carry, chunk, own):
        (image, scale, bias), (text, mask, columns, text_gradient) = carry, chunk
        cosine, true = cosines(pairs, text, own)
        slope = slopes(cosine * pairs.scale + pairs.bias, true, mask, columns) / number
        image += pairs.scale * product(slope, text)
        text_gradient += pairs.scale * product(slope.T, pairs.image)
        carry = image, scale + jnp.sum(slope * cosine), bias + jnp.sum(slope)
        return carry, (text, mask, columns, text_gradient)

    start = jnp.zeros_like(pairs.image), jnp.float32(0), jnp.float32(0)
    chunk = pairs.text, pairs.mask, columns, jnp.zeros_like(pairs.text)
    (image, scale, bias), (*_, text) = ring(step, axes, start, chunk)
    scale, bias = total(axes, (scale, bias))
    return Pairs(image, text, scale, bias, jnp.zeros_like(pairs.mask))


def softmax_forward(axes: tuple[str, ...], pairs: Pairs) -> tuple[tuple, tuple]:
    """((loss, accuracy), logarithms of the sums of exponentials by image and by text, [b])."""

    def step(carry, chunk, own):
        (rows, ranked), (text, mask, columns) = carry, chunk
        cosine, true = cosines(pairs, text, own)
        logits = cosine * pairs.scale + pairs.bias
        rows = merged(rows, jnp.where(mask > 0, logits, LOWEST), axis=1)
        columns = merged(columns, jnp.where(pairs.mask[:, None] > 0, logits, LOWEST), axis=0)
        return (rows, ranks(ranked, cosine, true, mask)), (text, mask, columns)

    zeros = jnp.zeros(len(pairs.image))
    start = zeros + LOWEST, zeros
    carry, chunk = ring(step, axes, (start, start), (pairs.text, pairs.mask, start))
    (rows, ranked), (*_, columns) = carry, chunk
    by_image, by_text = (highest + jnp.log(s) for highest, s in (rows, columns))
    own = ranked[1] * pairs.scale + pairs.bias
    value = jnp.sum(pairs.mask * ((by_image + by_text) / 2 - own))
    value, right = total(axes, (value, hits(pairs, ranked)))
    number = count(axes, pairs.mask)
    return (value / number, right / number), (by_image, by_text)


def merged(state: tuple, logits: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """(highest logit [b], sum of exponentials of differences from it [b]) with more logits."""
    highest, sums = state
    new = jnp.maximum(highest, jnp.max(logits, axis=axis))
    added = jnp.sum(jnp.exp(logits - jnp.expand_dims(new, axis)), axis=axis)
    return new, sums * jnp.exp(highest - new) + added


def softmax_backward(axes: tuple[str, ...], pairs: Pairs, sums: tuple) -> Pairs:
    """Gradients of the mean loss; those of scale and bias are sums over all devices."""
    by_image, by_text = sums

    def logit_gradients(logits, true, mask, by_text):
        logits = jnp.where(counted(pairs, mask) > 0, logits, LOWEST)
        shares = jnp.exp(logits - by_image[:, None]) + jnp.exp(logits - by_text)
        return counted(pairs, mask) * (shares / 2 - true)

    return gradients(axes, pairs, logit_gradients, by_text)


KINDS = {
    'sigmoid': (sigmoid_forward, sigmoid_backward),
    'softmax': (softmax_forward, softmax_backward),
}
