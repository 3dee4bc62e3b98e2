"""timm's class VisionTransformerRelPos: biases of attention by the offset of two patches.

They are those of an MLP of log-spaced offsets (arXiv:2111.09883 section 3.3) or of a table, in each
block or shared, and there are no other positions. GELU is exact, norms have epsilon 1e-6.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.assumed import half_normalisation
from vit_jax.convert.biases import whole_groups
from vit_jax.convert.documents import Notes, mlp_ratio
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece, linear_pieces
from vit_jax.convert.timm import arguments, shared, vit, vit_saving
from vit_jax.convert.timm.config import POOL_NAMES, with_normalisation
from vit_jax.convert.timm.pooling import pooling
from vit_jax.convert.timm.shared import BLOCK
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models import block, relative
from vit_jax.models.vit import Vit

SIGNATURE = arguments.Signature(
    'VisionTransformerRelPos', 'relpos.json', dict(
        img_size=224, patch_size=16, in_chans=3, num_classes=1000, global_pool='avg',
        embed_dim=768, depth=12, num_heads=12, mlp_ratio=4, qkv_bias=True, qk_norm=False,
        init_values=1e-6, class_token=False, fc_norm=False, rel_pos_type='mlp', rel_pos_dim=None,
        shared_rel_pos=False, embed_layer=None, norm_layer=None, act_layer=None, block_fn=None,
    ),
    only=dict(
        embed_layer=(None,), norm_layer=(None,), act_layer=(None,),
        block_fn=(None, 'ResPostRelPosBlock'), global_pool=('avg', 'token', ''),
    ),
)  # fmt: skip
OWN, SHARED = f'{BLOCK}attn.rel_pos.', 'shared_rel_pos.'
TABLE = 'relative_position_bias_table'
SWIN = 'log-spaced offsets as in Swin v2 are not supported'
HIDDEN = 128  # hidden size of the MLP without rel_pos_dim


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays, or the architecture of the config, are of this class."""
    of_class = any(name.startswith((OWN, SHARED)) for name in names)
    return of_class or arguments.known_name(config, SIGNATURE) is not None


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this class."""
    return isinstance(model, Vit) and model.style.bias is not None


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Biases in `style.unbiased` that the file lacks as well: qkv_bias is a flag."""
    return whole_groups(model, block.PROJECTIONS)


def bias_of(arrays: Mapping[str, Array]) -> tuple[relative.Bias, int]:
    """(biases by offset, number of heads)."""
    start = OWN if any(name.startswith(OWN) for name in arrays) else SHARED
    shared = start == SHARED
    if f'{start}{TABLE}' in arrays:
        return relative.Bias('table', shared), shape_of(arrays, f'{start}{TABLE}', 2)[1]
    hidden = shape_of(arrays, f'{start}mlp.fc1.weight', 2)[0]
    if f'{start}mlp.fc2.bias' not in arrays:
        raise UserError(f'array {start}mlp.fc2.weight without a bias: {SWIN}')
    heads = shape_of(arrays, f'{start}mlp.fc2.weight', 2)[0]
    return relative.Bias('mlp', shared, hidden=hidden), heads


def inferred_arguments(arrays: Mapping[str, Array], bias: relative.Bias) -> dict[str, Any]:
    """{argument: value}, as far as names and shapes of arrays determine it."""
    return shared.inferred_arguments(arrays) | dict(
        qkv_bias=f'{BLOCK}attn.qkv.bias' in arrays, qk_norm=f'{BLOCK}attn.q_norm.weight' in arrays,
        init_values=shared.SCALED if f'{BLOCK}ls1.gamma' in arrays else shared.UNSCALED,
        rel_pos_type='mlp' if bias.kind == 'mlp' else 'bias', rel_pos_dim=bias.hidden,
        shared_rel_pos=bias.shared,
    )  # fmt: skip


def stated_arguments(args: dict[str, Any]) -> dict[str, Any]:
    """The given arguments, with the values that `inferred_arguments` has for them."""
    stated = dict(args)
    kind = args.get('rel_pos_type')
    if kind is not None:
        stated['rel_pos_type'] = 'mlp' if kind.startswith('mlp') else 'bias'
        if kind.startswith('mlp') and 'swin' in kind:
            raise UserError(f'config.json: rel_pos_type is {brief(repr(kind))}: {SWIN}')
    if 'rel_pos_dim' in args:
        stated['rel_pos_dim'] = (args['rel_pos_dim'] or HIDDEN) if kind != 'bias' else None
    if args.get('block_fn') is not None:  # has no layer scale, but that initial value
        stated['init_values'] = None
    return stated


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json."""
    args = arguments.arguments(config, SIGNATURE)
    bias, heads = bias_of(arrays)
    inferred = inferred_arguments(arrays, bias)
    mlp_dim = shape_of(arrays, f'{BLOCK}mlp.fc2.weight', 2)[1]
    shared.check_arguments(config, stated_arguments(args), inferred, mlp_dim)
    if inferred['init_values'] == shared.UNSCALED and 'block_fn' not in args:
        raise UserError(
            'blocks with norms before attention and MLP have these arrays, and so have blocks with '
            'norms behind them: put a config.json beside them, with timm\'s name as '
            '{"architecture": "vit_relpos_base_patch16_rpn_224"}'
        )
    pool, guessed, unsettled = pooling(args, config, arrays)
    fields = shared.fields_of(arrays, args, inferred, pool) | dict(
        mlp_dim=mlp_dim, num_heads=heads, gelu='exact', epsilon=1e-6, posemb='none',
        style=block.Style(
            order='pre' if args.get('block_fn') is None else 'post',
            norms=('query_key',) if inferred['qk_norm'] else (),
            unbiased=() if inferred['qkv_bias'] else block.PROJECTIONS, bias=bias,
        ),
    )  # fmt: skip
    channels = inferred['in_chans']
    default = half_normalisation(channels)
    return 'vit', *with_normalisation(fields, config, channels, default, guessed, unsettled)


def table_rows(arrays: Mapping[str, Array]) -> None:
    """None, as there is no position table."""


def offset_rows(arrays: Mapping[str, Array]) -> tuple[str, int] | None:
    """(name, rows) of a table of biases by offset; None without one."""
    name = next((start + TABLE for start in (OWN, SHARED) if start + TABLE in arrays), None)
    return name and (name, shape_of(arrays, name, 2)[0])


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file."""
    rows, bias = vit.stem_pieces(model), model.style.bias
    if bias.shared:
        rows += bias_pieces(SHARED, 'bias', (), bias)
    for i in range(model.depth):
        theirs, index = f'blocks.{i}', (i,)
        rows += vit.block_pieces(theirs, index, model, gate=False)
        if not bias.shared:
            rows += bias_pieces(f'{theirs}.attn.rel_pos.', 'encoder/attn/bias', index, bias)
    return rows + vit.head_pieces(model)


def bias_pieces(theirs: str, ours: str, index: tuple, bias: relative.Bias) -> list[Piece]:
    """Pieces of the biases by offset of a block, or of shared ones."""
    if bias.kind == 'table':
        return [Piece(f'{theirs}{TABLE}', f'{ours}_table', index)]
    return [
        piece for n in (1, 2)
        for piece in linear_pieces(f'{theirs}mlp.fc{n}', f'{ours}_fc{n}', index)
    ]  # fmt: skip


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    return {
        'style.bias': (model.style.bias,), 'style.order': ('pre', 'post'),
        'style.norms': ((), ('query_key',)),
    } | dict(
        epsilon=(1e-6,), gelu=('exact',), glu=(False,), resnet=(None,),
        pool=('cls', 'gap', 'none'), dist_token=(False,), registers=(0,), posemb=('none',),
        pre_norm=(False,), last_norm=('tokens', 'pooled'), representation_size=(None,),
    )  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json for timm.create_model('local-dir:...')."""
    style, bias = model.style, model.style.bias
    args = dict(
        mlp_ratio=mlp_ratio(model.mlp_dim, model.width),
        global_pool=POOL_NAMES[model.pool],
        qkv_bias='query' not in style.unbiased, qk_norm='query_key' in style.norms,
        init_values=model.layer_scale, class_token='cls' in model.prefix,
        fc_norm=model.last_norm == 'pooled', shared_rel_pos=bias.shared,
        rel_pos_type='mlp' if bias.kind == 'mlp' else 'bias',
        rel_pos_dim=bias.hidden if bias.kind == 'mlp' and bias.hidden != HIDDEN else None,
    )  # fmt: skip
    rpn = 'vit_relpos_base_patch16_rpn_224'
    name = rpn if style.order == 'post' else 'vit_relpos_base_patch16_224'
    return vit_saving.document(name, args, SIGNATURE, model, size, classes)
