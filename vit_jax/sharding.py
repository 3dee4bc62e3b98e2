"""Sharding: the mesh, the placement of parameters by name, global arrays of batches."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.io.bounds import Positive
from vit_jax.models.parameters import find_rule, leaf_name, named_leaves

P = PartitionSpec
AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))


def make_mesh(
    devices: Sequence[jax.Device] | None = None,
    *,
    data: Literal[-1] | Positive[int] = -1,
    fsdp: Positive[int] = 1,
    tensor: Positive[int] = 1,
) -> Mesh:
    """Arranges devices in a mesh; the product of its axes is the number of devices.

    On several TPU slices only `data` spans slices, as the network between them is slow.

    Args:
      devices: devices of the mesh. None: all.
      data: devices along the axis that splits batches and replicates parameters. -1: as many as
        the other axes leave.
      fsdp: devices along the axis that splits batches and parameters.
      tensor: devices along the axis that splits attention heads and hidden features of the MLPs.

    Raises:
      UserError: the axes do not cover the devices, or slices do not divide `data`.
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


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError unless each micro-batch divides evenly among the devices."""
    parts = mesh.shape['data'] * mesh.shape['fsdp']
    if batch_size % (parts * accumulate):
        of = f' in {accumulate} micro-batches' if accumulate > 1 else ''
        raise UserError(
            f'batch size {batch_size}{of} is not divisible by the {parts} devices of mesh axes '
            f'data and fsdp; {parts * accumulate} and its multiples are'
        )


def spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules: tuple = ()) -> PartitionSpec:
    """The PartitionSpec of a parameter by its name; see `models.parameters.find_rule`.

    Raises UserError if no rule matches or a dimension does not divide evenly.
    """
    axes = find_rule(name, shape, rules).spec
    for size, axis in zip(shape, axes, strict=False):
        parts = math.prod(mesh.shape[a] for a in named_axes(axis))
        if size % parts:
            fitting = [str(n) for n in range(1, min(size, 1024) + 1) if size % n == 0]
            raise UserError(
                f'{name} {shape}: dimension {size} is not divisible by mesh axis '
                f'{" x ".join(named_axes(axis))}={parts}, but by {", ".join(fitting)}'
            )
    return axes


def named_axes(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return (axis,) if isinstance(axis, str) else axis or ()


def by_name(tree: Any, mesh: Mesh, rules: tuple = ()) -> Any:
    """NamedShardings of a tree of arrays or shapes by their names; scalars are replicated."""

    def place(path, leaf):
        shape = np.shape(leaf)
        rule = spec(leaf_name(path), tuple(shape), mesh, rules) if shape else P()
        return NamedSharding(mesh, rule)

    return jax.tree_util.tree_map_with_path(place, tree)


def shardings(state: Any, mesh: Mesh, rules: tuple = ()) -> Any:
    """NamedShardings of a step.State of shapes, as a State.

    Optimizer state is sharded like the parameter that it mirrors; the rest (counts, Adafactor's
    factors) is replicated. `extra` of the objective is sharded by name, as parameters are.
    """
    params, extra = (by_name(tree, mesh, rules) for tree in (state.params, state.extra))
    shapes, placements = named_leaves(state.params), named_leaves(params)

    def mirrored(path, leaf):
        name = leaf_name(path)
        for param, placement in placements.items():
            if name.endswith(f'/{param}') and leaf.shape == shapes[param].shape:
                return placement
        return NamedSharding(mesh, P())

    opt_state = jax.tree_util.tree_map_with_path(mirrored, state.opt_state)
    step = NamedSharding(mesh, P())
    return state.replace(step=step, params=params, opt_state=opt_state, extra=extra)


def add_shardings(shapes: Any, shardings: Any) -> Any:
    """Adds shardings to a tree of shapes; both trees are alike."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes, shardings,
    )  # fmt: skip


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree of arrays or shapes."""
    return jax.tree.map(lambda x: x.sharding, tree)


@functools.cache
def local_parts(mesh: Mesh) -> tuple[int, list[int]]:
    """(number of equal parts of a batch, indices of the parts on this process's devices)."""
    parts = mesh.shape['data'] * mesh.shape['fsdp']
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((parts,))
    return parts, sorted({rows.start or 0 for (rows,) in places.values()})


def rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Rows int64 [b] of a global batch [B] that are on this process's devices.

    If `tensor` spans processes, several of them have the same rows.
    """
    parts, local = local_parts(mesh)
    size = batch_size // parts
    return (np.array(local)[:, None] * size + np.arange(size)).ravel()


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays, split over data and fsdp, from this process's rows as numpy arrays."""
    sharding = NamedSharding(mesh, BATCH)
    parts, local = local_parts(mesh)

    def array(values):
        size = len(values) // len(local)

        def part(index):
            begin = local.index((index[0].start or 0) // size) * size
            return values[begin : begin + size]

        return jax.make_array_from_callback((size * parts, *values.shape[1:]), sharding, part)

    return {k: array(v) for k, v in batch.items()}


def with_mesh(mesh: Mesh, function: Callable) -> Callable:
    """Wraps a function to be traced with a mesh set, by which models shard their activations."""

    @functools.wraps(function)
    def on_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return on_mesh
