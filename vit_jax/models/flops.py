"""FLOPs of a forward pass of a Vision Transformer."""

import flax.linen as nn

from vit_jax.models import resnet


def vit_flops(
    model: nn.Module, image_shape: tuple[int, ...], visible: int | None = None
) -> int:
    """FLOPs of a forward pass of a `vit.Vit` over one image [H, W, C], see `Vit.flops`.

    All patches are embedded, and `visible` of them go through the blocks; None: all.
    """
    h, w, c = image_shape
    p, d = model.patch_size, model.width
    rows, columns = model.grid(image_shape)
    patches = rows * columns
    n = patches if visible is None else visible
    t = n + sum(model.prefix.values())
    adds = 0
    if model.resnet is not None:
        adds += resnet.multiply_adds(image_shape, model.resnet, model.resnet_width)
        c = resnet.channels(model.resnet, model.resnet_width)
    adds += patches * p[0] * p[1] * c * d
    mlp = (3 if model.glu else 2) * d * model.mlp_dim
    adds += model.depth * block_adds(t, d, mlp)
    if model.posemb == 'relative':
        adds += model.depth * t * (2 * t - 1) * d
    if model.pool == 'map':
        read = t if model.pool_style.prefix else n
        hidden = model.pool_style.mlp_dim or model.mlp_dim
        adds += read * (2 * d * d + 2 * d) + 2 * d * d + 2 * d * hidden
    bias = model.style.bias
    if bias is not None and bias.kind == 'mlp':
        offsets = (2 * rows - 1) * (2 * columns - 1)
        adds += offsets * bias.hidden * (2 + model.num_heads) * (1 if bias.shared else model.depth)
    outputs, features = (t if model.pool == 'none' else 1), d * (1 + (model.pool == 'cls_gap'))
    if model.representation_size is not None:
        adds += outputs * features * model.representation_size
        features = model.representation_size
    heads = 1 + model.dist_head
    return 2 * (adds + outputs * features * (model.num_classes or 0) * heads)


def text_flops(model: nn.Module, length: int) -> int:
    """FLOPs of a forward pass of a `text.Text` over one text of `length` tokens."""
    d = model.width
    adds = model.depth * block_adds(length, d, (3 if model.glu else 2) * d * model.mlp_dim)
    if model.pool == 'map':
        hidden = model.pool_style.mlp_dim or model.mlp_dim
        adds += length * (2 * d * d + 2 * d) + 2 * d * d + 2 * d * hidden
    outputs = length if model.pool == 'none' else 1
    return 2 * (adds + outputs * d * (model.num_classes or 0))


def block_adds(tokens: int, width: int, mlp: int) -> int:
    """Multiply-adds of a block: projections, attention, and `mlp` of them for each token."""
    return tokens * (4 * width * width + 2 * tokens * width + mlp)
