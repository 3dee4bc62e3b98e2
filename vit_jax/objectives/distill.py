"""Distillation: a classifier learns from labels and from a teacher that sees the same images.

DeiT (arXiv:2012.12877) and the patient, consistent teacher (arXiv:2106.05237). B batch, K classes.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.io.bounds import Checkpoint, Float, NonNegative, Positive, Rate, Share, Size
from vit_jax.models import embedding, parameters
from vit_jax.models.memory import shard_batch
from vit_jax.objectives import (
    Examples,
    Objective,
    Trained,
    flexible,
    losses,
    masked_mean,
    supervised,
)

METRICS = {
    'loss': 'min', 'label_loss': 'min', 'teacher_loss': 'min', 'accuracy': 'max',
    'agreement': 'max',
}  # fmt: skip


def distill(
    model: nn.Module,
    examples: Examples,
    *,
    teacher: Checkpoint,
    kind: Literal['hard', 'soft'] = 'hard',
    alpha: Share = 0.5,
    tau: Positive[float] = 1.0,
    divisor: Literal['examples', 'elements'] = 'examples',
    teacher_size: Size | None = None,
    teacher_dtype: Float = 'float32',
    loss: Literal['softmax', 'sigmoid'] = 'softmax',
    label_smoothing: Rate = 0.0,
    mixup: NonNegative[float] = 0.0,
    cutmix: NonNegative[float] = 0.0,
    mix_by: Literal['batch', 'example'] = 'batch',
    mix_shift: Positive[int] = 1,
    mix_union: bool = False,
    patch_sides: tuple[Positive[int], ...] = (),
    patch_grid: Positive[int] = 7,
    predict_side: Positive[int] | None = None,
) -> Objective:
    """Trains a classifier by (1 - alpha) * loss with labels + alpha * loss with a teacher.

    The teacher is in evaluation mode and sees the student's images as they are after augmentation
    and mixing. In a model with a distillation token and its head (`model.dist_head`) the class head
    learns from the labels alone, the other from the teacher alone, and predictions are the mean of
    both (arXiv:2012.12877 section 4). In any other model one head learns from both; alpha 1 with
    kind soft is then the function matching of arXiv:2106.05237.

    Metrics: `label_loss` and `teacher_loss`, the two terms without their weights; `accuracy`, of
    the predictions; `agreement`, the share of examples for which the head that the teacher trains
    has the teacher's class.

    Args:
      model: the student, as `models.build` makes it.
      examples: the training examples, with `image` [H, W, C] in the spec.
      teacher: any classifier of the same classes that `vit_jax.load` takes.
      kind: hard: cross-entropy with the teacher's class (arXiv:2012.12877 eq. 3). soft:
        tau^2 * KL(teacher || student) of softmaxes at temperature tau (eq. 2).
      alpha: weight of the loss with the teacher.
      tau: temperature of kind soft.
      divisor: what kind soft is divided by: the number of examples, as in eq. 2, or that of all
        B x K elements, as in facebookresearch/deit losses.py, which weakens the loss by the factor
        K.
      teacher_size: size to which the teacher's images are resized (bicubic, antialiased). None:
        that of its positions, or of the student's images if the teacher takes any size.
      teacher_dtype: dtype of the teacher's matrix products, as `model.matmul_dtype`.
      loss, label_smoothing, mixup, cutmix, mix_by, mix_shift, mix_union: those of objective
        supervised; labels alone are smoothed.
      patch_sides, patch_grid, predict_side: those of objective supervised, for the student. A
        FlexiViT is trained so (arXiv:2212.08013 section 3.4).
    """
    own = supervised.supervised(
        model, examples, loss=loss, label_smoothing=label_smoothing, mixup=mixup, cutmix=cutmix,
        mix_by=mix_by, mix_shift=mix_shift, mix_union=mix_union, patch_sides=patch_sides,
        patch_grid=patch_grid, predict_side=predict_side,
    )  # fmt: skip
    shape = examples.spec['image'].shape
    size = size_for(teacher, teacher_size, shape)
    patches = flexible.Patches(model, shape, patch_sides, patch_grid, predict_side)
    expert = checked(teacher, model, examples).clone(matmul_dtype=teacher_dtype, precision=None)

    def targets(params, images):
        """Logits [B, K] of the teacher for normalised images of the student."""
        images = renormalised(images, model, expert)
        if images.shape[1:3] != size:
            resized = (len(images), *size, images.shape[-1])
            images = shard_batch(jax.image.resize(images, resized, 'cubic', antialias=True))
        return jax.lax.stop_gradient(expert.apply({'params': params}, images)[0])

    def loss_of(side):
        def loss_fn(params, extra, frozen, batch, key, step):
            images, labels = supervised.model_inputs(
                batch, key, model=model, loss=loss, mixup=mixup, cutmix=cutmix, mix_by=mix_by,
                mix_shift=mix_shift, mix_union=mix_union,
            )  # fmt: skip
            logits, out = patches.apply(params, images, side, train=True, rngs={'dropout': key})
            of_labels, of_teacher = out.get('logits_cls', logits), out.get('logits_dist', logits)
            expected = targets(frozen['teacher'], images)
            mask = batch['mask'].astype(jnp.float32)
            label_loss = losses.LOSSES[loss](of_labels, labels, label_smoothing=label_smoothing)
            teacher_loss = from_teacher(of_teacher, expected, kind=kind, tau=tau, divisor=divisor)
            value = (1 - alpha) * label_loss + alpha * teacher_loss
            true = losses.heaviest(labels) if mixup or cutmix else labels
            rows = {
                'loss': value, 'label_loss': label_loss, 'teacher_loss': teacher_loss,
                'accuracy': losses.hits(logits, true),
                'agreement': losses.hits(of_teacher, jnp.argmax(expected, axis=-1)),
            }  # fmt: skip
            metrics = {name: masked_mean(x, mask) for name, x in rows.items()}
            return metrics['loss'], (metrics, {})

        return loss_fn

    # Training is counted as three forward passes; the teacher has one.
    flops = own.flops + expert.flops((*size, shape[-1])) / 3
    return own._replace(
        frozen={'teacher': teacher.params}, flops=flops, **patches.variants(loss_of)
    )


def from_teacher(
    logits: jax.Array,
    expected: jax.Array,
    *,
    kind: Literal['hard', 'soft'],
    tau: float = 1.0,
    divisor: Literal['examples', 'elements'] = 'examples',
) -> jax.Array:
    """Loss by example, float32 [B], of logits [B, K] whose teacher has the logits `expected`.

    The settings are those of `distill`.
    """
    if kind == 'hard':
        return losses.softmax_xent(logits, jnp.argmax(expected, axis=-1))
    student, teacher = (
        jax.nn.log_softmax(x.astype(jnp.float32) / tau) for x in (logits, expected)
    )
    divergence = tau**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return divergence / (logits.shape[-1] if divisor == 'elements' else 1)


def renormalised(images: jax.Array, model: nn.Module, other: nn.Module) -> jax.Array:
    """Images [B, H, W, C] that are normalised for a model, normalised for another one."""
    if (tuple(model.mean), tuple(model.std)) == (tuple(other.mean), tuple(other.std)):
        return images
    pixels = images * jnp.asarray(model.std) + jnp.asarray(model.mean)
    return embedding.standardised(pixels, other.mean, other.std)


def size_for(
    teacher: Trained, size: int | tuple[int, int] | None, shape: tuple[int, ...]
) -> tuple[int, int]:
    """(height, width) of the teacher's images, for images [H, W, C] of the student."""
    if size is None:
        return tuple(teacher.image_size or shape[:2])
    size = (size, size) if isinstance(size, int) else tuple(size)
    needed = parameters.abstract(teacher.model, (1, *size, shape[-1]))
    if jax.tree.map(jnp.shape, needed) != jax.tree.map(jnp.shape, teacher.params):
        raise UserError(
            f'objective.teacher_size is {list(size)}, and {teacher.address} has positions for '
            f'images of {list(teacher.image_size)}: leave it out, or resize the teacher by '
            'python -m vit_jax.convert SRC DST --image_size'
        )
    return size


def checked(teacher: Trained, model: nn.Module, examples: Examples) -> nn.Module:
    """The teacher's model; raises UserError unless it has the student's classes and channels."""
    expert, where = teacher.model, f'objective.teacher {teacher.address}'
    if expert.num_classes != model.num_classes:
        heads = expert.num_classes or 'no'
        raise UserError(f'{where} has {heads} classes, and the student {model.num_classes}')
    if len(expert.mean) != len(model.mean):
        raise UserError(
            f'{where} takes images of {len(expert.mean)} channels, and the student of '
            f'{len(model.mean)}'
        )
    ours, theirs = tuple(examples.names.get('classes', ())), tuple(teacher.classes or ())
    if ours != theirs and sorted(ours) == sorted(theirs):
        i = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise UserError(
            f'{where} has the classes in another order: number {i} is {theirs[i]}, and {ours[i]} '
            'in the data'
        )
    return expert
