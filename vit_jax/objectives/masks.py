"""Segmentation by a set of masks (EoMT, arXiv:2503.19108): each true mask has one prediction.

A batch is {image: uint8 [B, H, W, C], mask: [B]} and the masks of the images. For semantic
segmentation they are in label_map [B, Y, X], one for each class that is present; pixels of a label
that is no class, such as 255, are in none. For instances they are masks [B, M, Y, X], 1 inside, of
the classes labels [B, M], which are padded with -1; for panoptic segments segments [B, Y, X], the
number of the label of each pixel, or a larger one. Shapes: Q predictions, K classes.
"""

from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io.bounds import NonNegative, Positive, Range, Share
from vit_jax.models.masks import RULES, around_encoder
from vit_jax.models.vit import Vit
from vit_jax.objectives import Examples, Objective, class_count, headless, mask_losses, matching
from vit_jax.objectives.segment import check_spec

POINTS = 0x706F696E  # folded into the key for points and masked attention; dropout uses the key
METRICS = {'loss': 'min', 'class_loss': 'min', 'mask_loss': 'min', 'dice_loss': 'min'}
POWER = 0.9  # of the decay of masked attention (tue-mps/eomt lightning_module.py, poly_power)


def masks(
    model: Vit,
    examples: Examples,
    *,
    queries: Positive[int] = 100,
    query_blocks: Positive[int] = 4,
    most_masks: Positive[int] | None = None,
    points: Positive[int] = 12544,
    oversample: Annotated[float, Range(1)] = 3.0,
    importance: Share = 0.75,
    class_weight: NonNegative[float] = 2.0,
    mask_weight: NonNegative[float] = 5.0,
    dice_weight: NonNegative[float] = 5.0,
    no_object: NonNegative[float] = 0.1,
) -> Objective:
    """Trains the ViT as an EoMT: queries join its last blocks and predict classes and masks.

    Parameters of the ViT are in the subtree `vit`, beside those of `models.masks.MaskClassifier`.
    The loss is that of Mask2Former (arXiv:2112.01527), summed over the predictions before each of
    the last blocks and after them; costs of matches have the weights of the losses. Attention of
    these blocks is masked by the predictions before them, with a probability that falls to 0 in one
    block after the other (section 3.3): it takes a sixth of the run in each, and begins at equal
    distances, from a sixth of the run in the first to four sixths in the last of the blocks.

    Evaluations read `logits` [B, Q, K + 1], of which the last class is no object, and the logits
    `masks` [B, Q, y, x], on a grid of patches that is doubled until its cells have 4 pixels or
    fewer, but at least once. They have no masked attention, as the model at the end.

    Args:
      model: ViT, as `models.build` makes it; the head is left out.
      examples: the training examples, with `image` and either `label_map`, or `labels` and `masks`
        or `segments`.
      queries: number of queries Q, at least that of an example's masks.
      query_blocks: number of blocks that queries pass.
      most_masks: of a label map, the number of classes that have masks, the largest; others of an
        image have none. None: all classes, or as many as queries. Time and memory grow with it.
      points: number of points at which masks are compared: uniform ones for matches, and for the
        loss where the prediction is uncertain.
      oversample: how many times as many are drawn, from which the uncertain ones are chosen.
      importance: share of points that are chosen so; others are uniform.
      class_weight: weight of the cross-entropy of classes.
      mask_weight: weight of the cross-entropy of points.
      dice_weight: weight of the dice loss.
      no_object: weight of predictions without a mask in the cross-entropy; others have 1.
    """
    classes = class_count(model, examples, 'masks')
    model = headless(model, examples, 'masks', pixels=False)
    most = check_masks(examples, classes, queries, most_masks)
    doubled = max((max(model.stride).bit_length() - 1) - 2, 1)
    net = around_encoder(
        model, num_classes=classes, queries=queries, query_blocks=query_blocks, upscales=doubled
    )
    net.check()
    shape = examples.spec['image'].shape
    weights = dict(class_loss=class_weight, mask_loss=mask_weight, dice_loss=dice_weight)

    def init(key):
        return net.init(key, jnp.zeros((1, *shape)))['params']

    def loss(params, extra, frozen, batch, key, step):
        keys = jax.random.split(jax.random.fold_in(key, POINTS), query_blocks + 2)
        share = masked_shares(query_blocks, step / examples.steps)
        out = net.apply(
            {'params': params}, net.normalise(batch['image']), train=True, masked=share,
            rngs={'dropout': key, 'mask': keys[0]},
        )[1]  # fmt: skip
        targets, total = targets_of(batch, classes, most), dict.fromkeys(weights, 0.0)
        predictions = zip(keys[1:], out['logits_by_block'], out['masks_by_block'], strict=True)
        for one, logits, predicted in predictions:
            found = set_losses(
                one, logits, predicted, targets, batch['mask'], points=points,
                oversample=oversample, importance=importance, weights=weights, no_object=no_object,
            )  # fmt: skip
            total = {name: total[name] + found[name] for name in weights}
        value = sum(weights[name] * total[name] for name in weights)
        return value, ({'loss': value} | total, {})

    def predict(params, batch):
        return net.apply({'params': params}, net.normalise(batch['image']))[1]

    return Objective(
        init, loss, predict, rules=RULES, flops=net.flops(shape),
        indivisible='losses are divided by the number of masks in the whole batch',
    )  # fmt: skip


def check_masks(
    examples: Examples, classes: int, queries: int, most: int | None
) -> int:
    """Most masks of an example; raises UserError unless these are in the spec, and few enough."""
    given = [name for name in ('masks', 'segments') if name in examples.spec]
    if given:
        if 'labels' not in examples.spec:
            raise UserError(f'objective masks needs `labels` beside `{given[0]}`, a class for each')
        count = examples.spec['labels'].shape[0]
    else:
        check_spec(examples, classes)
        count = min(classes, queries) if most is None else most
    if count > queries:
        raise UserError(
            f'objective.queries is {queries}, fewer than the {count} masks that an example may have'
        )
    return count


def targets_of(
    batch: Mapping[str, jax.Array], classes: int, most: int
) -> mask_losses.Targets:
    """The true masks of a batch, up to `most` of an example; those that do not count have none."""
    if 'label_map' in batch:
        found = mask_losses.of_label_map(batch['label_map'], classes, most)
    elif 'segments' in batch:
        numbers = jnp.broadcast_to(jnp.arange(most), batch['labels'].shape)
        found = mask_losses.Targets(batch['labels'], batch['segments'][:, None], numbers)
    else:
        found = mask_losses.Targets(
            batch['labels'], batch['masks'], jnp.ones_like(batch['labels'])
        )
    labels = jnp.where(batch['mask'][:, None] > 0, found.labels, -1)
    return found._replace(labels=labels)


def masked_shares(blocks: int, progress: jax.Array) -> jax.Array:
    """Probability of masked attention in each of the last blocks, at a share of the run [0, 1]."""
    start = jnp.linspace(1, 4, blocks) / 6  # tue-mps/eomt configs
    return (1 - jnp.clip((progress - start) * 6, 0, 1)) ** POWER


def set_losses(
    key: jax.Array, logits: jax.Array, predicted: jax.Array, targets: mask_losses.Targets,
    mask: jax.Array, *, points: int, oversample: float, importance: float,
    weights: dict[str, float], no_object: float,
) -> dict[str, jax.Array]:  # fmt: skip
    """Losses of the batch's predictions: `class_loss`, `mask_loss`, `dice_loss`.

    The latter are sums over true masks divided by their number, or 1.

    Args:
      key: JAX key for points.
      logits: of classes, [B, Q, K + 1].
      predicted: logits of masks, [B, Q, y, x].
      targets: the true masks.
      mask: [B], 1 for the examples that count.
      points, oversample, importance, no_object: those of `masks`.
      weights: weight of each loss in the costs of matches.
    """
    keys, valid = jax.random.split(key), targets.labels >= 0
    uniform = jax.random.uniform(keys[0], (len(logits), 1, points, 2))
    fixed = jax.lax.stop_gradient(predicted)
    entropy, dice = mask_losses.match_costs(
        mask_losses.at_points(fixed, uniform), mask_losses.targets_at(targets, uniform)
    )
    true = matching.true_probabilities(jax.lax.stop_gradient(logits), targets.labels)
    cost = weights['mask_loss'] * entropy + weights['dice_loss'] * dice
    matched = matching.assign(cost - weights['class_loss'] * true, valid)
    chosen = jnp.take_along_axis(predicted, matched[:, :, None, None], axis=1)  # [B, M, y, x]
    places = mask_losses.uncertain_points(
        keys[1], jax.lax.stop_gradient(chosen), points, oversample, importance
    )
    entropy, dice = mask_losses.losses_at(
        mask_losses.at_points(chosen, places), mask_losses.targets_at(targets, places)
    )
    count = jnp.maximum(jnp.sum(valid), 1)
    of_masks = {'mask_loss': entropy, 'dice_loss': dice}
    return {
        'class_loss': matching.class_loss(logits, targets.labels, matched, mask, no_object),
        **{name: jnp.sum(jnp.where(valid, x, 0)) / count for name, x in of_masks.items()},
    }
