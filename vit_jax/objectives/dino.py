"""Self-distillation without labels: DINO (arXiv:2104.14294).

A batch is {global: uint8 [B, 2, H, W, C], local: uint8 [B, L, h, w, C], mask: [B]}; V = 2 + L crops
of an image, K prototypes, D width. Numbers and schedules are those of facebookresearch/dino,
main_dino.py.
"""

import zlib
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vit_jax.errors import UserError
from vit_jax.io.bounds import NonNegative, Positive, Rate
from vit_jax.models import resizing
from vit_jax.models.memory import shard_batch
from vit_jax.models.parameters import gathered, map_by_name
from vit_jax.models.prototypes import RULES, Prototypes, unit
from vit_jax.models.vit import Vit
from vit_jax.objectives import Examples, Objective, headless, masked_mean

METRICS = {'loss': 'min', 'entropy': 'min', 'entropy_of_mean': 'max', 'deviation': 'max'}
# Added to the number of patches in a row before their table is resized, as the scale there is
# (h + 0.1) / 14 (vision_transformer.py, interpolate_pos_encoding).
OFFSET = 0.1
COLLAPSED = 0.01  # of `deviation`
ALIKE = 0.001  # nats, of what an output tells of its image: entropy_of_mean less entropy


def dino(
    model: nn.Module,
    examples: Examples,
    *,
    prototypes: Positive[int] = 65_536,
    hidden: Positive[int] = 2048,
    bottleneck: Positive[int] = 256,
    scaled: bool = False,
    student_temperature: Positive[float] = 0.1,
    teacher_temperature: Positive[float] = 0.04,
    first_temperature: Positive[float] = 0.04,
    temperatures: NonNegative[int] = 0,
    temperature_steps: Positive[int] = 1,
    center_momentum: Rate = 0.9,
    teacher_momentum: Rate = 0.996,
) -> Objective:
    """Trains a ViT to predict, from each crop of an image, what its moving average sees in another.

    The teacher, the moving average, sees the two global crops; its probabilities, centred and of a
    low temperature, are the targets of the other crops' by the student. Evaluations use the
    teacher. Stochastic depth is the student's alone. The task is `crops`.

    Metrics are of the teacher: `entropy`, in nats, of its probabilities for a crop; the entropy of
    their mean over the batch, `entropy_of_mean`; and the deviation over the batch of each channel
    of the normalised class token, times the root of the width (`deviation`): 1 where features are
    spread over the sphere, 0 where they are equal for all images (arXiv:2011.10566 section 4.1).
    A warning says that these have collapsed where the deviation is below 0.01, or the two entropies
    within 0.001: the outputs are then the same for all images, uniform or of one prototype.

    With FSDP the student's weights are gathered once a step, for both passes and their gradients:
    they are in memory whole, in the dtype of products.

    Args:
      model: a ViT with a class token, as `models.build` makes it.
      examples: the training examples, of the task `crops`.
      prototypes: number K of outputs of the head.
      hidden: size of both hidden layers of the head.
      bottleneck: size of the vectors that are compared with the prototypes.
      scaled: whether the prototypes' lengths are learnt (norm_last_layer false there); else they
        are 1.
      student_temperature: divides the logits of the student.
      teacher_temperature: divides the centred logits of the teacher, after the warm-up.
      first_temperature: the first one of the warm-up.
      temperatures: number of temperatures in the linear warm-up, from the first one to the last.
        0: no warm-up.
      temperature_steps: updates with each of these; those of an epoch, there.
      center_momentum: share of the old centre that an update keeps; the mean of the teacher's
        logits has the rest.
      teacher_momentum: share of the teacher that the first update keeps; it rises to 1 by half a
        cosine over the run.
    """
    vit, image, local = checked(model, examples)
    head = Prototypes(prototypes, hidden, bottleneck, scaled, vit.product_dtype)
    run = partial(tokens, vit, image.shape[:2])

    def init(key):
        keys = jax.random.split(key, 3)
        params = vit.init(keys[0], jnp.zeros((1, *image.shape)))['params']
        features = jnp.zeros((1, vit.width))
        return {
            'vit': redrawn(keys[1], params), 'head': head.init(keys[2], features)['params'],
        }  # fmt: skip

    def logits(params, features):
        flat = shard_batch(features.reshape(-1, features.shape[-1]))
        return head.apply({'params': params['head']}, flat).reshape(*features.shape[:2], -1)

    def temperature(step):
        stair = jnp.minimum(step // temperature_steps / max(temperatures - 1, 1), 1)
        first = first_temperature if temperatures else teacher_temperature
        return first + (teacher_temperature - first) * stair

    def loss(params, extra, frozen, batch, key, step):
        mask = batch['mask'].astype(jnp.float32)
        kinds = [name for name in ('global', 'local') if name in batch]
        seen = run(extra['average']['vit'], batch['global'])
        outputs = jax.lax.stop_gradient(logits(extra['average'], seen))  # [B, 2, K]
        targets = jax.nn.softmax((outputs - extra['center']) / temperature(step))
        whole = gathered(params['vit'], vit.product_dtype)  # for the passes of both sizes
        features = [
            run(whole, batch[kind], jax.random.fold_in(key, i))
            for i, kind in enumerate(kinds)
        ]
        student = logits(params, jnp.concatenate(features, axis=1)) / student_temperature
        value = masked_mean(cross_entropy(student, targets), mask)
        metrics = {'loss': value, **spread(targets, seen[:, 0], mask)}
        return value, (metrics, {'center': mean_over(outputs.mean(axis=1), mask)})

    def extra(params):
        return {'average': jax.tree.map(jnp.array, params), 'center': jnp.zeros(prototypes)}

    def update(extra, params, aux, step):
        progress = jnp.minimum(step / examples.steps, 1)
        share = (1 - teacher_momentum) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        average = jax.tree.map(
            lambda old, new: old + share * (new - old), extra['average'], params
        )
        center = center_momentum * extra['center'] + (1 - center_momentum) * aux['center']
        return {'average': average, 'center': center}

    def predict(params, batch):
        return vit.apply({'params': params['vit']}, vit.normalise(batch['image']))[1]

    return Objective(
        init, loss, predict, extra, update, rules=(*RULES, (r'center', P())),
        flops=flops_of(vit, head, image, local), inputs={'image': image}, warn=warning,
    )  # fmt: skip


def checked(model: nn.Module, examples: Examples) -> tuple[Vit, Any, Any]:
    """(the Vit without a head, shape of a global crop [H, W, C], of the local ones [L, h, w, C]).

    Raises UserError for examples of another task, and for a model that can't read all crops.
    """
    if 'global' not in examples.spec:
        raise UserError(
            f"objective dino trains on crops of images, and data.task makes "
            f"{', '.join(examples.spec)}; set data.task to 'crops'"
        )
    crops = examples.spec['global']
    image = jax.ShapeDtypeStruct(crops.shape[1:], crops.dtype)
    vit = headless(model, examples._replace(spec={'image': image}), 'dino')
    if 'cls' not in vit.prefix:
        raise UserError(f'objective dino reads a class token, which model.pool {vit.pool!r} has '
                        "not; model.pool 'cls' has one")  # fmt: skip
    if vit.posemb not in ('learn', 'sincos2d', 'none') or (
        vit.posemb_at != 'stem' or vit.style.bias is not None
    ):
        raise UserError(
            'objective dino reads crops of two sizes: positions are those of model.posemb learn, '
            'sincos2d or none, in the stem'
        )
    local = examples.spec.get('local')
    try:
        if local is not None:
            vit.grid(local.shape[1:])
    except UserError as e:
        raise UserError(f'config data.local_size: {e}') from e
    return vit, image, local


def tokens(
    vit: Vit, size: tuple[int, int], params: Any, crops: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Class tokens [B, V, D] of crops uint8 [B, V, h, w, C], in one pass.

    Args:
      vit: the model.
      size: size of the images that the positions of the parameters are for.
      params: its parameters, whose positions are resized to the crops.
      crops: the crops of each image, all of one size.
      key: of stochastic depth and dropout. None: without them.
    """
    b, v = crops.shape[:2]
    images = shard_batch(vit.normalise(crops.reshape(b * v, *crops.shape[2:])))
    if 'posemb' in params:
        grids = vit.grid(size), vit.grid(crops.shape[2:])
        table = resizing.positions(params['posemb'], *grids, 'bicubic', offset=OFFSET)
        params = params | {'posemb': table}
    train = {} if key is None else dict(train=True, rngs={'dropout': key})
    return vit.apply({'params': params}, images, **train)[1]['cls'].reshape(b, v, -1)


def cross_entropy(student: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy [B] over all pairs of a global crop and another crop.

    Args:
      student: logits [B, V, K] of all crops, the global ones first.
      targets: the teacher's probabilities [B, 2, K] for the global crops.
    """
    others = student.shape[1] - 2
    both = jnp.broadcast_to(targets.sum(axis=1, keepdims=True), student[:, 2:].shape)
    targets = jnp.concatenate([targets[:, ::-1], both], axis=1)  # no crop is its own target
    total = jnp.sum(targets * jax.nn.log_softmax(student.astype(jnp.float32)), axis=(1, 2))
    return -total / (2 + 2 * others)


def flops_of(vit: Vit, head: Prototypes, image: Any, local: Any) -> float:
    """FLOPs of the passes over the crops of an image, of which a third counts for the teacher's.

    Training is counted as three forward passes; the teacher's have no backward pass.
    """
    sizes = vit.width, head.hidden, head.hidden, head.bottleneck, head.count
    each = 2 * sum(m * n for m, n in zip(sizes, sizes[1:], strict=False))
    count = 0 if local is None else local.shape[0]
    small = count * (vit.flops(local.shape[1:]) + each) if count else 0
    return 2 * (vit.flops(image.shape) + each) * 4 / 3 + small


def mean_over(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of values [B, ...] over the examples with mask [B] 1; 0 if there is none."""
    return jnp.tensordot(mask, values, 1, precision='highest') / jnp.maximum(jnp.sum(mask), 1)


def entropy(probabilities: jax.Array) -> jax.Array:
    """Entropy over the last axis, in nats."""
    return jnp.sum(jax.scipy.special.entr(probabilities), axis=-1)


def spread(
    targets: jax.Array, features: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """Metrics of the teacher by probabilities [B, 2, K] and features [B, D], see `dino`."""
    directions = unit(features, -1)
    variance = mean_over((directions - mean_over(directions, mask)) ** 2, mask)
    return {
        'entropy': masked_mean(entropy(targets).mean(axis=1), mask),
        'entropy_of_mean': entropy(mean_over(targets.mean(axis=1), mask)),
        'deviation': jnp.mean(jnp.sqrt(variance)) * features.shape[-1] ** 0.5,
    }


def warning(step: int, metrics: dict[str, float]) -> str | None:
    """Says that the teacher's features or outputs are the same for all images, where they are."""
    told = metrics['entropy_of_mean'] - metrics['entropy']
    if metrics['deviation'] >= COLLAPSED and told >= ALIKE:
        return None
    return (
        f'features have collapsed: their deviation over the batch is {metrics["deviation"]:.2g} of '
        f'1 where they are spread evenly; entropy {metrics["entropy"]:.4g}, of the mean output '
        f'{metrics["entropy_of_mean"]:.4g}; a lower teacher_temperature or optim.lr may prevent it'
    )


def redrawn(key: jax.Array, params: Any) -> Any:
    """Draws a Vit's initial parameters as facebookresearch/dino vision_transformer.py does.

    Kernels of the blocks, positions and the class token are normal of deviation 0.02, biases of the
    blocks 0. The patches' kernel and bias are uniform within the inverse root of their inputs.
    """

    def draw(name: str, x: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if name.startswith('embedding/'):
            limit = float(np.prod(params['embedding']['kernel'].shape[:-1])) ** -0.5
            return jax.random.uniform(own, x.shape, x.dtype, -limit, limit)
        if name in ('cls', 'posemb') or name.startswith('encoder/') and name.endswith('kernel'):
            return 0.02 * jax.random.normal(own, x.shape, x.dtype)
        if name.startswith('encoder/') and name.endswith('bias'):
            return jnp.zeros_like(x)
        return x

    return map_by_name(draw, params)
