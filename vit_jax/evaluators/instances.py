"""Detections from the outputs of a detector or of a mask classifier, in pixels of the images.

Shapes: B batch, Q queries, K classes, D detections, M true objects, h w of predicted masks, H W of
the view, Y X of the canvas, R rows of a block.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.evaluators.pixels import axes_of, in_blocks
from vit_jax.objectives import boxes

TRUTH = ('id', 'mask', 'size', 'boxes', 'labels', 'crowd', 'areas')


def detections(
    params: Any, batch: Mapping[str, jax.Array], *, predict: Callable, most: int,
    canvas: tuple[int, int] | None,
) -> dict[str, jax.Array]:  # fmt: skip
    """Detections of a batch beside its objects, see `average_precision.Image`.

    Args:
      params: parameters of the objective.
      batch: as `tasks.detect.whole_objects` makes it.
      predict: (params, batch) -> {'logits': [B, Q, K + 1], and 'boxes': [B, Q, 4] by their centres
        in shares of the view, or 'masks': logits [B, Q, h, w]}.
      most: detections of an image that count, those of the largest scores.
      canvas: (Y, X) of masks; without it, there must be boxes.
    """
    found = predict(params, batch)
    shares = jax.nn.softmax(found['logits'].astype(jnp.float32))[..., :-1]  # [B, Q, K]
    choose = of_queries if 'boxes' in found else of_queries_and_classes
    scores, labels, queries = choose(shares, most)  # [B, D]
    if 'boxes' in found:
        own = jnp.take_along_axis(found['boxes'], queries[..., None], axis=1)
        view = batch['image'].shape[1:3]
        made = {'found_boxes': in_image(own, view, batch['place'], batch['size'])}
    else:
        logits = jnp.take_along_axis(found['masks'], queries[..., None, None], axis=1)
        made = measured(logits, batch, canvas)
        scores = scores * made.pop('confidence')
    true = {f'true_{name}': batch[name] for name in TRUTH}
    return made | true | {'scores': scores, 'found_labels': labels}


def of_queries(shares: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(scores, labels, queries) [B, D]: each query has its best class, as of DETR and YOLOS.

    So do transformers' post_process_object_detection and hustvl/YOLOS models/detector.py.
    """
    scores, queries = jax.lax.top_k(shares.max(-1), min(most, shares.shape[1]))
    return scores, jnp.take_along_axis(shares.argmax(-1), queries, axis=1), queries


def of_queries_and_classes(
    shares: jax.Array, most: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(scores, labels, queries) [B, D]: the best pairs of a query and a class, as of EoMT.

    So does tue-mps/eomt training/mask_classification_instance.py.
    """
    b, q, k = shares.shape
    scores, pairs = jax.lax.top_k(shares.reshape(b, q * k), min(most, q * k))
    return scores, pairs % k, pairs // k


def in_image(
    centred: jax.Array, view: tuple[int, int], place: jax.Array, size: jax.Array
) -> jax.Array:
    """Boxes [B, D, 4], (x, y, width, height) in pixels of the images, cut off at their edges.

    Args:
      centred: boxes by their centres in shares of the view, [B, D, 4].
      view: its size (H, W).
      place: [B, 2, 2], see `tasks.place_of`.
      size: [B, 2], of the images.
    """
    corners = boxes.to_corners(centred.astype(jnp.float32)).reshape(*centred.shape[:2], 2, 2)
    scale, offset = place[:, None, None, ::-1, 0], place[:, None, None, ::-1, 1]  # of x, of y
    at = (corners * jnp.array(view[::-1], jnp.float32) - offset) / scale
    at = jnp.clip(at, 0, size[:, None, None, ::-1])
    return jnp.concatenate([at[:, :, 0], at[:, :, 1] - at[:, :, 0]], axis=-1)


def measured(
    logits: jax.Array, batch: Mapping[str, jax.Array], canvas: tuple[int, int]
) -> dict[str, jax.Array]:
    """What is to know of masks at the pixels of their images, where they are where logits are > 0.

    `found_areas` int [B, D], `found_boxes` [B, D, 4] around them, `confidence` [B, D], the mean of
    their probabilities; and if the batch has masks of objects, `common` int [B, D, M], the pixels
    that two masks share, and `true_pixels` int [B, M].

    Args:
      logits: [B, D, h, w].
      batch: `image`, `place`, `size` and perhaps `masks`, of `tasks.detect.whole_objects`.
      canvas: (Y, X).
    """
    (height, width), (b, d) = canvas, logits.shape[:2]
    logits = logits.astype(jnp.float32)
    axes = axes_of(logits, batch, canvas)
    bits = batch.get('masks', jnp.zeros((b, 1, height, -(-width // 8)), jnp.uint8))
    m = bits.shape[1]
    blocks = (
        in_blocks(axes.rows, 0.0), in_blocks(axes.in_rows[..., None], False),
        in_blocks(bits.swapaxes(1, 2).reshape(b, height, m * bits.shape[3]), 0),
    )  # fmt: skip

    def add(total, block):
        own, valid, true = block  # [B, R, h], [B, R, 1], [B, R, M * X / 8]
        values = axes.values(logits, own)  # [B, D, R, X]
        masks = (values > 0) & (valid & axes.in_columns[:, None])[:, None]
        true = jnp.unpackbits(true.reshape(*true.shape[:2], m, bits.shape[3]), axis=-1, count=width)
        # counts of 0 and 1 are exact in float32
        common = jnp.einsum(
            'bdrx,brmx->bdm', masks.astype(jnp.float32), true.astype(jnp.float32)
        )
        return {
            'found_areas': total['found_areas'] + masks.sum((2, 3), dtype=jnp.int32),
            'confidence': total['confidence'] + (jax.nn.sigmoid(values) * masks).sum((2, 3)),
            'columns': total['columns'] | masks.any(2),
            'common': total['common'] + common.astype(jnp.int32),
            'true_pixels': total['true_pixels'] + true.sum((1, 3), dtype=jnp.int32),
        }, masks.any(3)

    total, hit = jax.lax.scan(add, {
        'found_areas': jnp.zeros((b, d), jnp.int32), 'confidence': jnp.zeros((b, d)),
        'columns': jnp.zeros((b, d, width), bool), 'common': jnp.zeros((b, d, m), jnp.int32),
        'true_pixels': jnp.zeros((b, m), jnp.int32),
    }, blocks)  # fmt: skip
    hit = jnp.moveaxis(hit, 0, 2).reshape(b, d, -1)  # [Y / R, B, D, R] -> [B, D, Y]
    (y, tall), (x, wide) = extent(hit), extent(total.pop('columns'))
    total['confidence'] /= total['found_areas'] + 1e-6
    if 'masks' not in batch:
        del total['common'], total['true_pixels']
    return total | {'found_boxes': jnp.stack([x, y, wide, tall], axis=-1).astype(jnp.float32)}


def extent(hit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(first, length), int [...], of the range that holds all true ones of bool [..., n]."""
    first, last = hit.argmax(-1), hit.shape[-1] - hit[..., ::-1].argmax(-1)
    some = hit.any(-1)
    return jnp.where(some, first, 0), jnp.where(some, last - first, 0)
