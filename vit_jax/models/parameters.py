"""Names of parameters, and what follows from a name: sharding, and place in layer-wise decay.

A name is a path in the tree of parameters, such as 'encoder/attn/qkv/kernel'.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from vit_jax.errors import UserError

Layer = Literal['stem', 'blocks', 'head']
# A mesh of no devices, of a platform without which a model would ask JAX where it computes.
NOWHERE = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind='cpu', num_cores=None, platform='cpu')
)


class Rule(NamedTuple):
    """Sharding and layer of the parameters whose names end with a match of `pattern`.

    Attributes:
      pattern: regular expression, which matches from the start of the name or from a slash on.
      spec: mesh axes ('data', 'fsdp', 'tensor') of the dimensions; P() replicates.
      layer: 'stem' lies before block 1, 'blocks' are stacked along the first dimension, 'head' lies
        after them. Layer-wise decay of the learning rate depends on it.
    """

    pattern: str
    spec: P
    layer: Layer = 'head'


# The first rule that matches applies. Shapes are as in models.layers; M is the hidden size of an
# MLP, F the features of a convolution. Kernels of stacked MLPs are [L, D, M] and [L, M, D].
RULES = (
    # [L, D, 3, H, C]
    Rule(r'(en|de)coder/attn/qkv/kernel', P(None, 'fsdp', None, 'tensor', None), 'blocks'),
    Rule(r'(en|de)coder/attn/qkv/bias', P(None, None, 'tensor', None), 'blocks'),  # [L, 3, H, C]
    # [L, H, C, D]
    Rule(r'(en|de)coder/attn/out/kernel', P(None, 'tensor', None, 'fsdp'), 'blocks'),
    # [L, 2 T - 1, H, C]
    Rule(r'(en|de)coder/attn/relative', P(None, None, 'tensor', None), 'blocks'),
    Rule(r'(en|de)coder/attn/rope', P(None, None, 'tensor', None), 'blocks'),  # [L, 2, H, C / 2]
    Rule(r'(en|de)coder/attn/bias_table', P(None, None, 'tensor'), 'blocks'),  # [L, R, H]
    Rule(r'(en|de)coder/attn/bias_fc[12]/kernel', P(), 'blocks'),  # [L, 2, M] and [L, M, H]
    Rule(r'(en|de)coder/(mlp|channel_mixing)/(fc1|gate)/kernel', P(None, 'fsdp', 'tensor'),
         'blocks'),
    # [L, M]
    Rule(r'(en|de)coder/(mlp|channel_mixing)/(fc1|gate)/bias', P(None, 'tensor'), 'blocks'),
    Rule(r'(en|de)coder/(mlp|channel_mixing)/fc2/kernel', P(None, 'tensor', 'fsdp'), 'blocks'),
    Rule(r'(en|de)coder/token_mixing/fc1/kernel', P(None, None, 'fsdp'), 'blocks'),  # [L, N, M]
    Rule(r'(en|de)coder/token_mixing/fc2/kernel', P(None, 'fsdp', None), 'blocks'),  # [L, M, N]
    Rule(r'(en|de)coder/(\w+/)*(bias|scale[12]?|posemb(_[yx])?)', P(), 'blocks'),
    Rule(r'vocabulary', P('tensor', 'fsdp'), 'stem'),  # [V, D]
    Rule(r'embedding/kernel', P(None, None, None, 'fsdp'), 'stem'),  # [P, P, C, D]
    Rule(r'(conv_root|conv_proj|conv\d)/kernel', P(None, None, None, 'fsdp'), 'stem'),  # [h,w,C,F]
    Rule(r'bias_(table|fc[12]/(kernel|bias))', P(), 'stem'),  # shared by all blocks
    Rule(r'(embedding|patch_norm|pre_norm|gn_root|gn_proj|gn\d)/(bias|scale)', P(), 'stem'),
    Rule(r'cls|dist|registers|posemb(_[yx])?', P(), 'stem'),
    Rule(r'map_head/(query|key|value)/kernel', P('fsdp', 'tensor', None)),  # [D, H, C]
    Rule(r'map_head/(query|key|value)/bias', P('tensor', None)),  # [H, C]
    Rule(r'map_head/out/kernel', P('tensor', None, 'fsdp')),  # [H, C, D]
    Rule(r'map_head/mlp/fc1/kernel', P('fsdp', 'tensor')),  # [D, M]
    Rule(r'map_head/mlp/fc1/bias', P('tensor')),  # [M]
    Rule(r'map_head/mlp/fc2/kernel', P('tensor', 'fsdp')),  # [M, D]
    Rule(r'(pre_logits|head|dist_head)/kernel', P('fsdp', None)),  # [D, K]
    # all others, those of an objective's own layers included
    Rule(r'bias|scale[12]?|probe|temperature', P()),
)


def tower_of(name: str) -> str:
    """The tower of a `two_towers.TwoTowers` that a parameter is of, 'image' or 'text'; else ''."""
    first = name.partition('/')[0]
    return first if first in ('image', 'text') else ''


def leaf_name(path: tuple) -> str:
    """Name of a leaf, such as 'encoder/attn/qkv/kernel', from its path in jax.tree_util."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def named_leaves(tree: Any) -> dict[str, Any]:
    """{name: leaf} of a tree."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_by_name(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps function(name, leaf, ...) over a tree, with what `rest` have in the leaves' places."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(leaf_name(path), *leaves), tree, *rest
    )


def find_rule(name: str, shape: tuple[int, ...], rules: tuple = ()) -> Rule:
    """The first of `rules`, (pattern, spec) or (pattern, spec, layer), then RULES that matches.

    Raises UserError if none does.
    """
    for rule in (*rules, *RULES):
        if re.search(f'(^|/)({rule[0]})$', name):
            return Rule(*rule)
    raise UserError(
        f'no sharding rule for {name} {list(shape)}; the `rules` of an objective have a row for '
        'each array of its own (docs/extending.md)'
    )


def gathered(params: Any, dtype: DTypeLike) -> Any:
    """Parameters without FSDP's sharding, gathered once for all passes that read them.

    What FSDP shards has the dtype then, in which products read it anyway. Whole weights of this
    dtype are in memory; gradients are scattered as each pass has them. Without FSDP returns
    `params` themselves.
    """
    if jax.sharding.get_abstract_mesh().shape.get('fsdp', 1) == 1:
        return params

    def whole(name, x):
        spec = find_rule(name, x.shape).spec
        if 'fsdp' not in spec:
            return x
        return gathered_array(x, P(*(None if a == 'fsdp' else a for a in spec)), spec, dtype)

    return map_by_name(whole, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered_array(x: jax.Array, spec: P, gradient: P, dtype: DTypeLike) -> jax.Array:
    """x as `dtype`, sharded by `spec`; its gradient is sharded by `gradient`."""
    return jax.lax.with_sharding_constraint(x.astype(dtype), spec)


gathered_array.defvjp(
    lambda x, spec, gradient, dtype: (
        gathered_array(x, spec, gradient, dtype), jnp.zeros((), x.dtype)
    ),
    lambda spec, gradient, dtype, like, d: (
        jax.lax.with_sharding_constraint(d, gradient).astype(like.dtype),
    ),
)


def abstract(model: nn.Module, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Any:
    """Shapes and dtypes of a model's parameters for inputs of a shape; starts no device."""
    inputs = jax.ShapeDtypeStruct(shape, dtype)
    with jax.sharding.use_abstract_mesh(NOWHERE):
        return jax.eval_shape(lambda x: model.init(jax.random.key(0), x)['params'], inputs)


def check_same(params: Any, expected: Any, origin: str) -> None:
    """Raises UserError, naming a parameter, unless names and shapes equal those of `expected`.

    Args:
      params: tree of parameters, or of their shapes.
      expected: the same of the model that a config describes.
      origin: where `params` come from, for the message.
    """
    actual, wanted = (
        {name: list(x.shape) for name, x in named_leaves(tree).items()}
        for tree in (params, expected)
    )
    for name in sorted(actual.keys() | wanted.keys()):
        if actual.get(name) != wanted.get(name):
            raise UserError(
                f'{origin}: parameter {name} is {actual.get(name, "absent")}, the model of the '
                f'config has {wanted.get(name, "none")}'
            )
