"""Detection by a set of boxes (arXiv:2106.00666): each true box is matched to one prediction.

A batch is {image: uint8 [B, H, W, C], boxes: float [B, M, 4], labels: int [B, M], mask: [B]}. Boxes
are (x0, y0, x1, y1) in shares of the image's width and height; labels are padded with -1. Shapes: Q
predictions, K classes.
"""

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io.bounds import NonNegative, Positive
from vit_jax.models.detector import RULES, around_encoder
from vit_jax.models.vit import Vit
from vit_jax.objectives import Examples, Objective, boxes, class_count, headless, matching

METRICS = {'loss': 'min', 'class_loss': 'min', 'box_loss': 'min', 'giou_loss': 'min'}


def detect(
    model: Vit,
    examples: Examples,
    *,
    queries: Positive[int] = 100,
    class_cost: NonNegative[float] = 1.0,
    box_cost: NonNegative[float] = 5.0,
    giou_cost: NonNegative[float] = 2.0,
    box_weight: NonNegative[float] = 5.0,
    giou_weight: NonNegative[float] = 2.0,
    no_object: NonNegative[float] = 0.1,
) -> Objective:
    """Trains the ViT as a YOLOS: detection tokens beside its patches predict classes and boxes.

    Parameters of the ViT are in the subtree `vit`, beside those of `models.detector.Detector`. The
    loss is that of arXiv:2005.12872 (eq. 2, appendix A.2), of the last block alone. The ViT has
    mid-position embeddings with `model.posemb_at` 'layers'.

    Evaluations read `logits` [B, Q, K + 1], of which the last class is no object, and `boxes`
    [B, Q, 4], by centre x, centre y, width and height.

    Args:
      model: ViT, as `models.build` makes it; the head is left out.
      examples: the training examples, with `image`, `boxes` and `labels` in the spec.
      queries: number of detection tokens Q, at least that of boxes M.
      class_cost: weight of the class's probability in the cost of a match.
      box_cost: weight of the distance of boxes in it, the sum over their four numbers.
      giou_cost: weight of the generalised intersection over union in it.
      box_weight: weight of that distance in the loss.
      giou_weight: weight of 1 - generalised intersection over union in the loss.
      no_object: weight of predictions without a box in the cross-entropy; others have 1.
    """
    classes = class_count(model, examples, 'detect')
    model = headless(model, examples, 'detect', pixels=False)
    net = around_encoder(model, num_classes=classes, queries=queries)
    net.check()
    shape = examples.spec['image'].shape
    check_spec(examples, queries)

    def init(key):
        return net.init(key, jnp.zeros((1, *shape)))['params']

    def loss(params, extra, frozen, batch, key, step):
        images = net.normalise(batch['image'])
        logits, out = net.apply({'params': params}, images, train=True, rngs={'dropout': key})
        labels = jnp.where(batch['mask'][:, None] > 0, batch['labels'], -1)
        matched = match(
            logits, out['boxes'], labels, batch['boxes'], class_cost=class_cost, box_cost=box_cost,
            giou_cost=giou_cost,
        )  # fmt: skip
        metrics = {
            'class_loss': matching.class_loss(
                logits, labels, matched, batch['mask'], no_object
            ),
            **box_losses(out['boxes'], batch['boxes'], labels >= 0, matched),
        }
        value = metrics['class_loss'] + box_weight * metrics['box_loss']
        value += giou_weight * metrics['giou_loss']
        return value, ({'loss': value} | metrics, {})

    def predict(params, batch):
        return net.apply({'params': params}, net.normalise(batch['image']))[1]

    return Objective(
        init, loss, predict, rules=RULES, flops=net.flops(shape),
        indivisible='losses are divided by the number of boxes in the whole batch',
    )  # fmt: skip


def check_spec(examples: Examples, queries: int) -> None:
    """Raises UserError unless examples have boxes, and not more than there are queries."""
    if not {'boxes', 'labels'} <= examples.spec.keys():
        raise UserError(
            "objective detect needs `boxes` and `labels`, as data.task 'detect' has them; these "
            f'examples have {", ".join(examples.spec)}'
        )
    count = examples.spec['boxes'].shape[0]
    if count > queries:
        raise UserError(
            f'objective.queries is {queries}, fewer than the {count} boxes that an example may have'
        )


def match(
    logits: jax.Array, predicted: jax.Array, labels: jax.Array, corners: jax.Array, *,
    class_cost: float, box_cost: float, giou_cost: float,
) -> jax.Array:  # fmt: skip
    """The prediction of each true box, int [B, M], at the least cost (arXiv:2005.12872 eq. 1).

    Args:
      logits: [B, Q, K + 1].
      predicted: boxes by their centres, [B, Q, 4].
      labels: int [B, M], -1 for none.
      corners: true boxes by their corners, [B, M, 4].
      class_cost, box_cost, giou_cost: those of `detect`.
    """
    true = matching.true_probabilities(logits, labels)
    distance = jnp.abs(predicted[:, None] - boxes.to_centres(corners)[:, :, None]).sum(-1)
    giou = boxes.generalised_iou(boxes.to_corners(predicted)[:, None], corners[:, :, None])
    cost = box_cost * distance - class_cost * true - giou_cost * giou
    return matching.assign(cost, labels >= 0)


def box_losses(
    predicted: jax.Array, corners: jax.Array, valid: jax.Array, matched: jax.Array
) -> dict[str, jax.Array]:
    """Sums over the batch's true boxes divided by their number, or 1: `box_loss`, `giou_loss`.

    The former is the distance of boxes by their centres, the latter 1 - generalised IoU.

    Args:
      predicted: boxes by their centres, [B, Q, 4].
      corners: true boxes by their corners, [B, M, 4].
      valid: bool [B, M].
      matched: int [B, M], the prediction of each true box.
    """
    chosen = jnp.take_along_axis(predicted, matched[:, :, None], axis=1)  # [B, M, 4]
    distance = jnp.abs(chosen - boxes.to_centres(corners)).sum(-1)
    giou = 1 - boxes.generalised_iou(boxes.to_corners(chosen), corners)
    count = jnp.maximum(jnp.sum(valid), 1)
    rows = {'box_loss': distance, 'giou_loss': giou}
    return {name: jnp.sum(jnp.where(valid, x, 0)) / count for name, x in rows.items()}
