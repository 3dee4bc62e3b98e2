"""timm's class Beit: BEiT and BEiT v2 (arXiv:2106.08254, arXiv:2208.06366).

Attention has biases by offset, those of each block or shared ones, instead of a position table or
beside it. Keys have no bias. GELU is exact, norms have epsilon 1e-6.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.assumed import guess_heads, half_normalisation
from vit_jax.convert.biases import whole_groups
from vit_jax.convert.documents import Notes, mlp_ratio
from vit_jax.convert.files import Array
from vit_jax.convert.official import shape_of
from vit_jax.convert.pieces import Piece
from vit_jax.convert.timm import arguments, eva, shared, vit, vit_saving
from vit_jax.convert.timm.config import POOL_NAMES, with_normalisation
from vit_jax.convert.timm.pooling import pooling
from vit_jax.convert.timm.shared import BLOCK
from vit_jax.errors import UserError
from vit_jax.models import block, relative
from vit_jax.models.vit import Vit

SIGNATURE = arguments.Signature(
    'Beit', 'beit.json', dict(
        img_size=224, patch_size=16, in_chans=3, num_classes=1000, global_pool='avg',
        embed_dim=768, depth=12, num_heads=12, qkv_bias=True, mlp_ratio=4, swiglu_mlp=False,
        scale_mlp=False, norm_layer=None, init_values=None, use_abs_pos_emb=True,
        use_rel_pos_bias=False, use_shared_rel_pos_bias=False, use_fc_norm=None,
    ),
    only=dict(norm_layer=(None,), global_pool=('avg', 'token', '')),
)  # fmt: skip
TABLE = 'relative_position_bias_table'
OWN, SHARED = f'{BLOCK}attn.{TABLE}', f'rel_pos_bias.{TABLE}'


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays, or the architecture of the config, are of this class."""
    return OWN in names or SHARED in names or arguments.known_name(config, SIGNATURE) is not None


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this class, whose keys have no bias."""
    bias = model.style.bias if isinstance(model, Vit) else None
    if bias is None or bias.kind != 'table':
        return False
    return 'cls' in model.prefix and 'key' in model.style.unbiased


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Biases in `style.unbiased` that the file lacks as well: of keys, or all by qkv_bias."""
    return whole_groups(model, block.PROJECTIONS) or ('key',)


def inferred_arguments(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """{argument: value}, as far as names and shapes of arrays determine it."""
    return shared.inferred_arguments(arrays) | dict(
        qkv_bias=f'{BLOCK}attn.q_bias' in arrays, swiglu_mlp=f'{BLOCK}mlp.fc1_g.weight' in arrays,
        scale_mlp=f'{BLOCK}mlp.norm.weight' in arrays,
        init_values=shared.SCALED if f'{BLOCK}gamma_1' in arrays else shared.UNSCALED,
        use_abs_pos_emb='pos_embed' in arrays, use_rel_pos_bias=OWN in arrays,
        use_shared_rel_pos_bias=SHARED in arrays,
    )  # fmt: skip


def describe(
    arrays: Mapping[str, Array], config: dict[str, Any]
) -> tuple[str, dict[str, Any], Notes]:
    """(kind, {field: value}, Notes) of the model, from arrays (names, shapes) and config.json."""
    args = arguments.arguments(config, SIGNATURE)
    inferred = inferred_arguments(arrays)
    mlp_dim = shape_of(arrays, f'{BLOCK}mlp.fc2.weight', 2)[1]
    shared.check_arguments(config, args, inferred, mlp_dim)
    pool, guessed, unsettled = pooling(args | {'fc_norm': args.get('use_fc_norm')}, config, arrays)
    if inferred['use_rel_pos_bias'] and inferred['use_shared_rel_pos_bias']:
        raise UserError(f'arrays {OWN} and {SHARED}: a sum of both biases is not supported')
    table = offset_rows(arrays)
    heads = args.get('num_heads') if table is None else shape_of(arrays, table[0], 2)[1]
    if heads is None:
        heads = guess_heads(inferred['embed_dim'], inferred['depth'])
        guessed = guessed | {'num_heads': 'fused weights do not show it'}
    bias = None
    if table is not None:
        bias = relative.Bias('table', shared=inferred['use_shared_rel_pos_bias'])
    fields = shared.fields_of(arrays, args, inferred, pool) | dict(
        mlp_dim=mlp_dim, num_heads=heads, glu=inferred['swiglu_mlp'], gelu='exact', epsilon=1e-6,
        posemb='learn' if inferred['use_abs_pos_emb'] else 'none', cls_posemb=True,
        interpolation='bicubic_antialias',
        style=block.Style(
            norms=('mlp',) if inferred['scale_mlp'] else (),
            unbiased=('key',) if inferred['qkv_bias'] else block.PROJECTIONS, bias=bias,
        ),
    )  # fmt: skip
    channels = inferred['in_chans']
    default = half_normalisation(channels)
    return 'vit', *with_normalisation(fields, config, channels, default, guessed, unsettled)


table_rows = vit.table_rows


def offset_rows(arrays: Mapping[str, Array]) -> tuple[str, int] | None:
    """(name, rows) of a table of biases by offset; None without one."""
    name = next((name for name in (OWN, SHARED) if name in arrays), None)
    return name and (name, shape_of(arrays, name, 2)[0])


def pieces(model: nn.Module) -> list[Piece]:
    """Pieces of all arrays of a model's file."""
    rows, bias = vit.stem_pieces(model), model.style.bias
    if bias is not None and bias.shared:
        rows.append(Piece(SHARED, 'bias_table'))
    for i in range(model.depth):
        theirs, index = f'blocks.{i}', (i,)
        rows += eva.block_pieces(theirs, index, model, separate=False, gate=True)
        if bias is not None and not bias.shared:
            rows.append(Piece(f'{theirs}.attn.{TABLE}', 'encoder/attn/bias_table', index))
    return rows + vit.head_pieces(model)


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    return {'style.bias': (model.style.bias,), 'style.norms': ((), ('mlp',))} | dict(
        epsilon=(1e-6,), gelu=('exact',), resnet=(None,), pool=('cls', 'gap', 'none'),
        cls_token=(None, True) if model.pool == 'cls' else (True,), dist_token=(False,),
        registers=(0,), posemb=('learn', 'none'), cls_posemb=(True,), pre_norm=(False,),
        last_norm=('tokens', 'pooled'), representation_size=(None,),
    )  # fmt: skip


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json for timm.create_model('local-dir:...')."""
    bias = model.style.bias
    args = dict(
        mlp_ratio=mlp_ratio(model.mlp_dim, model.width),
        global_pool=POOL_NAMES[model.pool],
        qkv_bias='query' not in model.style.unbiased, swiglu_mlp=model.glu,
        scale_mlp='mlp' in model.style.norms, init_values=model.layer_scale,
        use_abs_pos_emb=model.posemb == 'learn', use_rel_pos_bias=not bias.shared,
        use_shared_rel_pos_bias=bias.shared, use_fc_norm=model.last_norm == 'pooled',
    )  # fmt: skip
    name = 'beit_base_patch16_224'
    return vit_saving.document(name, args, SIGNATURE, model, size, classes)
