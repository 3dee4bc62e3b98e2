"""timm's class Eva: EVA (arXiv:2211.07636), EVA-02 (arXiv:2303.11331), RoPE-ViT (arXiv:2403.13298),
DINOv3 (arXiv:2508.10104), the Perception Encoder (arXiv:2504.13181) and others.

GELU is exact, norms have epsilon 1e-6 or 1e-5. Keys have no bias, unless attention is of the kind
'rope'. Position tables are resized by antialiased bicubic interpolation.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn

from vit_jax.convert.documents import mlp_ratio
from vit_jax.convert.pieces import Piece, linear_pieces, norm_pieces
from vit_jax.convert.timm import arguments, eva_model, vit_model
from vit_jax.convert.timm import vit as timm_vit
from vit_jax.convert.timm.config import POOL_NAMES, POOLS
from vit_jax.convert.timm.shared import BLOCK
from vit_jax.models import block, rotary, vit

SIGNS = ('attn.q_bias', 'attn.q_proj.weight', 'gamma_1', 'mlp.fc1_g.weight')  # of a block of Eva

describe = eva_model.describe
table_rows = timm_vit.table_rows
complete = timm_vit.complete


def matches(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the arrays are those of this class."""
    if 'patch_embed.proj.weight' not in names or 'patch_embed.norm.weight' in names:
        return False
    if arguments.known_name(dict(config), eva_model.SIGNATURE) is not None:
        return True
    if arguments.known_name(dict(config), vit_model.SIGNATURE) is not None:
        return False
    by_offset = any('relative_position' in name for name in names)
    unnormed = not {'norm.weight', 'fc_norm.weight'} & set(names)
    return not by_offset and (
        any(f'{BLOCK}{sign}' in names for sign in SIGNS) or 'rope.freqs' in names
        or 'norm_pre.weight' in names and unnormed
    )  # fmt: skip


def expresses(model: nn.Module) -> bool:
    """Whether a model is saved as one of this class.

    It has rotary positions, a norm within a gated MLP, or keys without a bias beside queries or
    values with one.
    """
    if not isinstance(model, vit.Vit) or model.style.bias is not None:
        return False
    style, absent = model.style, set(block.PROJECTIONS) & set(model.style.unbiased)
    return (
        style.rope is not None or 'key' in absent and len(absent) < 3
        or model.glu and 'mlp' in style.norms and not model.patch_norm
    )  # fmt: skip


def absent_biases(model: nn.Module) -> tuple[str, ...]:
    """Biases in `style.unbiased` that the file lacks as well: of keys, or all by qkv_bias."""
    absent = set(block.PROJECTIONS) & set(model.style.unbiased)
    return block.PROJECTIONS if len(absent) == 3 else ('key',) if 'key' in absent else ()


def has_separate_projections(model: nn.Module) -> bool:
    """Whether the file to save has separate arrays of query, key and value, as EVA-02 has."""
    return model.glu and 'mlp' in model.style.norms


def has_separate_gate(model: nn.Module) -> bool:
    """Whether the file to save has an array of the gate apart, as EVA-02 and DINOv3 have."""
    scaled = model.layer_scale is not None and model.style.order == 'pre'
    return model.glu and ('mlp' in model.style.norms or scaled)


def pieces_of(names: Collection[str]) -> Callable[[nn.Module], list[Piece]]:
    """`pieces` for the arrays of a file that is loaded, however it divides them."""
    return functools.partial(
        pieces, separate=f'{BLOCK}attn.q_proj.weight' in names,
        gate=f'{BLOCK}mlp.fc1_g.weight' in names,
    )  # fmt: skip


def pieces(
    model: nn.Module, separate: bool | None = None, gate: bool | None = None
) -> list[Piece]:
    """Pieces of all arrays of a model's file.

    `separate` and `gate` say whether query, key and value, and whether the gate of the MLP have
    arrays of their own; None: as in the file to save.
    """
    separate = has_separate_projections(model) if separate is None else separate
    gate = has_separate_gate(model) if gate is None else gate
    rope = model.style.rope
    rows = timm_vit.stem_pieces(model)
    if rope is not None and rope.learnt:
        rows.append(Piece('rope.freqs', 'encoder/attn/rope', layout='swapped'))
    for i in range(model.depth):
        rows += block_pieces(f'blocks.{i}', (i,), model, separate, gate)
    return rows + timm_vit.head_pieces(model)


def block_pieces(
    theirs: str, index: tuple, model: nn.Module, separate: bool, gate: bool
) -> list[Piece]:
    """Pieces of an encoder block; `separate` and `gate` are those of `pieces`."""
    rows = attention_pieces(f'{theirs}.attn', index, model, separate)
    rows += mlp_pieces(f'{theirs}.mlp', index, model, gate)
    for n in (1, 2):
        rows += norm_pieces(f'{theirs}.norm{n}.', f'encoder/norm{n}', index, model=model)
        if model.layer_scale is not None:
            rows.append(Piece(f'{theirs}.gamma_{n}', f'encoder/scale{n}', index))
    return rows


def attention_pieces(
    theirs: str, index: tuple, model: nn.Module, separate: bool
) -> list[Piece]:
    """Pieces of self-attention."""
    ours, norms, unbiased = 'encoder/attn', model.style.norms, model.style.unbiased
    absent = [name in unbiased for name in block.PROJECTIONS]
    if separate:
        rows = [p for i in range(3) for p in linear_pieces(
            f'{theirs}.{"qkv"[i]}_proj', f'{ours}/qkv', index, at=(i,), bias=not absent[i]
        )]  # fmt: skip
    else:
        rows = linear_pieces(f'{theirs}.qkv', f'{ours}/qkv', index, bias=not any(absent))
        if absent == [False, True, False]:
            rows += [Piece(f'{theirs}.{name}_bias', f'{ours}/qkv/bias', (*index, i), 'vector')
                     for i, name in ((0, 'q'), (2, 'v'))]  # fmt: skip
    if 'query_key' in norms:
        for name in ('q_norm', 'k_norm'):
            rows += norm_pieces(f'{theirs}.{name}.', f'{ours}/{name}', index, model=model)
    if 'attention' in norms:
        rows += norm_pieces(f'{theirs}.norm.', f'{ours}/norm', index, model=model)
    return rows + linear_pieces(f'{theirs}.proj', f'{ours}/out', index, inputs=2)


def mlp_pieces(theirs: str, index: tuple, model: nn.Module, gate: bool) -> list[Piece]:
    """Pieces of the MLP; the gate comes first where it shares an array."""
    ours, rows = 'encoder/mlp', []
    layers = [('fc1', 'fc1', None)]
    if model.glu and gate:
        layers = [('fc1_g', 'gate', None), ('fc1_x', 'fc1', None)]
    elif model.glu:
        layers = [('fc1', 'gate', (0, 2)), ('fc1', 'fc1', (1, 2))]
    for their_name, name, part in (*layers, ('fc2', 'fc2', None)):
        rows += linear_pieces(f'{theirs}.{their_name}', f'{ours}/{name}', index, part=part)
    if 'mlp' in model.style.norms:
        rows += norm_pieces(f'{theirs}.norm.', f'{ours}/norm', index, model=model)
    return rows


def limits(model: nn.Module) -> dict[str, tuple]:
    """{field: values that the format can express} for `save`."""
    style, pool = model.style, model.pool_style
    norms, reads = (style.norms,), (False,)
    if style.order == 'post':
        norms = (tuple(n for n in style.norms if n != 'query_key'),)
    if model.pool == 'map':  # reads all tokens
        reads = (True,) if model.prefix else (pool.prefix,)
    positioned = 'cls' in model.prefix and model.registers and model.posemb == 'learn'
    return {
        'style.order': ('pre', 'post'), 'style.norms': norms,
        'style.rope': (expressible(style.rope),), 'pool_style.prefix': reads,
        'pool_style.num_heads': (pool.num_heads,), 'pool_style.mlp_dim': (pool.mlp_dim,),
    } | dict(
        epsilon=(1e-6, 1e-5), gelu=('exact',), resnet=(None,), pool=tuple(POOLS.values()),
        posemb=('learn', 'none'), representation_size=(None,), dist_token=(False,),
        dist_head=(False,), last_norm=('tokens', 'pooled', 'none'),
        registers_posemb=(model.cls_posemb,) if positioned else (True, False),
    )  # fmt: skip


def expressible(rope: rotary.Rope | None) -> rotary.Rope | None:
    """The rotary positions that are nearest to these, of those that the format can express."""
    if rope is None or not rope.learnt:
        return rope
    return rotary.Rope(rope.base, 'index', order=rope.order, pairs='neighbours', learnt=True)


def model_config(
    model: nn.Module, size: tuple[int, int], classes: Sequence[str] | None
) -> dict[str, Any]:
    """Content of config.json for timm.create_model('local-dir:...').

    It names the architecture from whose arguments the fewest differ, and gives those that do. JSON
    cannot set the epsilon of norms, so that is the architecture's.
    """
    args, signature, fewest = written_arguments(model, size), eva_model.SIGNATURE, None
    for name in arguments.tables(signature)['architectures']:
        base = signature.of(name)
        supported = all(base[key] in values for key, values in signature.only.items())
        if supported and base['epsilon'] == model.epsilon:
            changes = {k: v for k, v in args.items() if v != base[k]}
            if fewest is None or len(changes) < len(fewest[1]):
                fewest = name, changes
    options = dict(first_conv='patch_embed.proj', classifier='head')
    return arguments.document(*fewest, model, size, classes, **options)


def written_arguments(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """{argument: value} of the class that outputs of the model depend on."""
    style, rope = model.style, model.style.rope
    args = dict(
        img_size=list(size), patch_size=list(model.patch_size), embed_dim=model.width,
        depth=model.depth, num_heads=model.num_heads,
        mlp_ratio=mlp_ratio(model.mlp_dim, model.width), swiglu_mlp=model.glu,
        global_pool=POOL_NAMES[model.pool],
        class_token='cls' in model.prefix, num_reg_tokens=model.registers,
        use_abs_pos_emb=model.posemb == 'learn', use_pre_transformer_norm=model.pre_norm,
        use_fc_norm=model.last_norm == 'pooled',
        use_post_transformer_norm=model.last_norm == 'tokens',
        use_post_norm=style.order == 'post', qk_norm='query_key' in style.norms,
        scale_attn_inner='attention' in style.norms, scale_mlp='mlp' in style.norms,
        attn_type='eva' if 'key' in style.unbiased else 'rope', init_values=model.layer_scale,
        qkv_bias=len(absent_biases(model)) < 3, qkv_fused=not has_separate_projections(model),
        use_rot_pos_emb=rope is not None,
    )  # fmt: skip
    apart = has_separate_gate(model) and 'mlp' not in style.norms  # as alignment makes it
    args['swiglu_align_to'] = (1 if model.mlp_dim % 8 else 8) if apart else 0
    if model.posemb == 'learn' and model.prefix:
        args['no_embed_class'] = not model.prefix_posemb
    if model.pool == 'map':
        hidden = model.pool_style.mlp_dim or model.mlp_dim
        args['attn_pool_num_heads'] = model.pool_style.num_heads or model.num_heads
        args['attn_pool_mlp_ratio'] = mlp_ratio(hidden, model.width)
    if rope is None:
        return args
    index = rope.coordinates == 'index'
    args['rope_type'] = 'mixed' if rope.learnt else 'cat' if index else 'dinov3'
    args |= dict(
        rope_temperature=rope.base, rope_grid_indexing='ij' if rope.order == 'yx' else 'xy',
        rope_rotate_half=rope.pairs == 'halves',
    )  # fmt: skip
    if not rope.learnt:
        args['rope_grid_offset'] = rope.offset
    if args['rope_type'] == 'cat':
        args['ref_feat_shape'] = None if rope.reference is None else list(rope.reference)
    return args
