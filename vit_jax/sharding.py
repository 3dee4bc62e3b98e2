"""Sharding: the mesh, an ordered table of rules by parameter name, global arrays of batches."""

import functools
import re
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.io.bounds import Positive
from vit_jax.optim import leaf_name

P = PartitionSpec
AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))

# The first rule whose pattern matches the end of a parameter's name applies; it is an error if none
# does. Dimensions: stacked layers first, then as in models.layers.
RULES = (
    (r'encoder/attn/qkv/kernel', P(None, 'fsdp', None, 'tensor', None)),  # [L, D, 3, H, C]
    (r'encoder/attn/qkv/bias', P(None, None, 'tensor', None)),  # [L, 3, H, C]
    (r'encoder/attn/out/kernel', P(None, 'tensor', None, 'fsdp')),  # [L, H, C, D]
    (r'encoder/(mlp|channel_mixing)/(fc1|gate)/kernel', P(None, 'fsdp', 'tensor')),  # [L, D, M]
    (r'encoder/(mlp|channel_mixing)/(fc1|gate)/bias', P(None, 'tensor')),  # [L, M]
    (r'encoder/(mlp|channel_mixing)/fc2/kernel', P(None, 'tensor', 'fsdp')),  # [L, M, D]
    (r'encoder/token_mixing/fc1/kernel', P(None, None, 'fsdp')),  # [L, N, M]
    (r'encoder/token_mixing/fc2/kernel', P(None, 'fsdp', None)),  # [L, M, N]
    (r'embedding/kernel', P(None, None, None, 'fsdp')),  # [P, P, C, D]
    (r'(conv_root|conv_proj|conv\d)/kernel', P(None, None, None, 'fsdp')),  # [h, w, C, F]
    (r'encoder/attn/relative', P(None, None, 'tensor', None)),  # [L, 2 T - 1, H, C]
    (r'map_head/(query|key|value)/kernel', P('fsdp', 'tensor', None)),  # [D, H, C]
    (r'map_head/(query|key|value)/bias', P('tensor', None)),  # [H, C]
    (r'map_head/out/kernel', P('tensor', None, 'fsdp')),  # [H, C, D]
    (r'map_head/mlp/fc1/kernel', P('fsdp', 'tensor')),  # [D, M]
    (r'map_head/mlp/fc1/bias', P('tensor')),  # [M]
    (r'map_head/mlp/fc2/kernel', P('tensor', 'fsdp')),  # [M, D]
    (r'(pre_logits|head|dist_head)/kernel', P('fsdp', None)),  # [D, K]
    (r'bias|scale|scale1|scale2|cls|dist|posemb(_[yx])?|registers|probe', P()),
)


def make_mesh(
    devices=None,
    *,
    data: Literal[-1] | Positive[int] = -1,
    fsdp: Positive[int] = 1,
    tensor: Positive[int] = 1,
):
    """Arranges devices in a mesh; the product of its axes is the number of devices.

    On several TPU slices only `data` spans slices, as the network between them is slow.

    Args:
      devices: devices of the mesh. None: all.
      data: devices along the axis that splits batches and replicates parameters. -1: as many as
        the other axes leave.
      fsdp: devices along the axis that splits batches and parameters.
      tensor: devices along the axis that splits attention heads and hidden features of the MLPs.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    if data == -1:
        shape[0] = len(devices) // (fsdp * tensor)
    if np.prod(shape) != len(devices):
        raise UserError(
            f'mesh data={data} fsdp={fsdp} tensor={tensor} does not cover {len(devices)} devices; '
            'the product must be their number, and data=-1 takes what the others leave'
        )
    auto = (AxisType.Auto,) * 3
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    split = dict(allow_split_physical_axes=True)  # such as fsdp=2 on a side of 4 chips
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, **split)
        return Mesh(placed, AXES, axis_types=auto)
    if shape[0] % slices:
        raise UserError(
            f'mesh axis data={shape[0]} is not divisible by the {slices} slices; fsdp and tensor '
            f'must lie within one, of {len(devices) // slices} devices'
        )
    within = (shape[0] // slices, *shape[1:])
    placed = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, **split)
    return Mesh(placed, AXES, axis_types=auto)


def check_batch(batch_size, mesh, accumulate=1):
    """Raises UserError unless each micro-batch divides evenly among the devices."""
    parts = mesh.shape['data'] * mesh.shape['fsdp']
    if batch_size % (parts * accumulate):
        of = f' in {accumulate} micro-batches' if accumulate > 1 else ''
        raise UserError(
            f'batch size {batch_size}{of} is not divisible by the {parts} devices of mesh axes '
            f'data and fsdp; {parts * accumulate} and its multiples are'
        )


def spec(name, shape, mesh, rules=()):
    """The PartitionSpec of a parameter by its name; `rules` take precedence over RULES.

    Raises ValueError if no rule matches, UserError if a dimension does not divide evenly.
    """
    for pattern, rule in (*rules, *RULES):
        if re.search(f'(^|/)({pattern})$', name):
            for size, axis in zip(shape, rule, strict=False):
                if axis and size % mesh.shape[axis]:
                    fitting = [str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0]
                    raise UserError(
                        f'{name} {shape}: dimension {size} is not divisible by mesh axis '
                        f'{axis}={mesh.shape[axis]}, but by {", ".join(fitting)}'
                    )
            return rule
    raise ValueError(f'no sharding rule for {name} {shape}; an objective has its own in `rules`')


def by_name(tree, mesh, rules=()):
    """NamedShardings of arrays by their names; scalars are replicated."""

    def place(path, leaf):
        shape = np.shape(leaf)
        rule = spec(leaf_name(path), tuple(shape), mesh, rules) if shape else P()
        return NamedSharding(mesh, rule)

    return jax.tree_util.tree_map_with_path(place, tree)


def shardings(state, mesh, rules=()):
    """NamedShardings for a State of shapes.

    Optimizer state is sharded like the parameter that it mirrors; the rest (counts, Adafactor's
    factors) is replicated. `extra` of the objective is sharded by name, as parameters are.
    """
    params, extra = (by_name(tree, mesh, rules) for tree in (state.params, state.extra))
    leaves = jax.tree_util.tree_leaves_with_path
    known = {
        leaf_name(path): (leaf.shape, place)
        for (path, leaf), place in zip(leaves(state.params), jax.tree.leaves(params), strict=True)
    }

    def mirrored(path, leaf):
        name = leaf_name(path)
        for param, (shape, place) in known.items():
            if name.endswith(f'/{param}') and leaf.shape == shape:
                return place
        return NamedSharding(mesh, P())

    opt_state = jax.tree_util.tree_map_with_path(mirrored, state.opt_state)
    step = NamedSharding(mesh, P())
    return state.replace(step=step, params=params, opt_state=opt_state, extra=extra)


def placed(shapes, where):
    """Adds shardings to a tree of shapes."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, where
    )


def places(tree):
    """The shardings of a tree of arrays or shapes."""
    return jax.tree.map(lambda x: x.sharding, tree)


@functools.cache
def shares(mesh):
    """(number of equal parts of a batch, indices of the parts on this process's devices)."""
    parts = mesh.shape['data'] * mesh.shape['fsdp']
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((parts,))
    return parts, sorted({rows.start or 0 for (rows,) in places.values()})


def rows(batch_size, mesh):
    """Rows int64 [b] of a global batch [B] that are on this process's devices.

    If `tensor` spans processes, several of them have the same rows.
    """
    parts, held = shares(mesh)
    size = batch_size // parts
    return (np.array(held)[:, None] * size + np.arange(size)).ravel()


def put(batch, mesh):
    """Makes global arrays, split over data and fsdp, from this process's rows as numpy arrays."""
    sharding = NamedSharding(mesh, BATCH)
    parts, held = shares(mesh)

    def array(local):
        size = len(local) // len(held)

        def share(index):
            begin = held.index((index[0].start or 0) // size) * size
            return local[begin : begin + size]

        return jax.make_array_from_callback((size * parts, *local.shape[1:]), sharding, share)

    return {k: array(v) for k, v in batch.items()}


def with_mesh(mesh, function):
    """Wraps a function to be traced with a mesh set, by which models shard their activations."""

    @functools.wraps(function)
    def on_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return on_mesh
