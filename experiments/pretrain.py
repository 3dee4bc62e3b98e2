"""Pre-training at the published sizes: FILE:b/16, l/16, h/14, G/14, e/14 and FILE:l/16-i21k.

Here: not yet run; made to be run where the machines are, and to be planned with before:

    python -m vit_jax.plan --config experiments/pretrain.py:h/14 --topology v4:8x8x16

b/16, l/16 and h/14 on JFT-300M and l/16-i21k on ImageNet-21k are those of arXiv:2010.11929 table 3:
batches of 4,096, Adam, linear decay after 10,000 steps of warm-up, 224 px. Published, fine-tuned
on ImageNet (table 2): l/16 87.76%, h/14 88.55%, l/16-i21k 85.30%, for 680, 2,500 and 230
TPUv3-core-days. G/14 is that of arXiv:2106.04560 (90.45% after fine-tuning): Adafactor with
momentum in bfloat16, reciprocal square root schedule with warm-up and cool-down, pooling by
attention; e/14 that of arXiv:2209.06794 with the same settings: 1,000,000 steps of 16,384 images.
The epochs of G/14, the rate and the weight decay of both are choices of this file.

JFT is not public. In its place stand drawn images, as many and with as many classes, so that the
recipes run as they are: --config.data.source.name=PATH puts other data there.
"""

from ml_collections import ConfigDict

JFT_300M = 'jft_like:303000000x18291'  # arXiv:2010.11929 section 4.1
JFT_3B = 'jft_like:3000000000x29593'  # arXiv:2106.04560 section 3
ADAM = dict(name='adamw', schedule='linear', warmup=10_000, weight_decay=0.1)
LARGE = dict(
    name='adafactor', schedule='rsqrt', warmup=10_000, cooldown=50_000, lr=8e-4,
    momentum_dtype='bfloat16', weight_decay=0.03, clip=1.0,
)  # fmt: skip
SPLITS = {  # training, and some 30,000 to 60,000 images of validation
    JFT_300M: ('train', 'test[:0.1%]'), JFT_3B: ('train', 'test[:0.01%]'),
    'imagenet21k': ('full[0.4%:]', 'full[:0.4%]'),
}  # fmt: skip
PRESETS = {  # model, data set, batch, length, optimizer, the mesh
    'b/16': ('vit-b/16', JFT_300M, 4096, dict(epochs=7), dict(ADAM, lr=8e-4), {}),
    'l/16': ('vit-l/16', JFT_300M, 4096, dict(epochs=14), dict(ADAM, lr=4e-4), {}),
    'l/16-i21k': ('vit-l/16', 'imagenet21k', 4096, dict(epochs=90), dict(ADAM, lr=1e-3), {}),
    'h/14': ('vit-h/14', JFT_300M, 4096, dict(epochs=14), dict(ADAM, lr=3e-4), {}),
    'G/14': ('vit-G/14', JFT_3B, 4096, dict(epochs=5), LARGE, dict(fsdp=8)),
    'e/14': ('vit-e/14', JFT_3B, 16_384, dict(steps=1_000_000), LARGE, dict(fsdp=16)),
}


def get_config(arg='b/16'):
    model, name, batch_size, length, optim, mesh = PRESETS[arg]

    config = ConfigDict(length)
    config.seed = 0

    config.model = dict(name=model, dtype='bfloat16')
    if arg in ('G/14', 'e/14'):
        config.model.update(pool='map', remat='dots_with_no_batch_dims_saveable')
    if arg == 'l/16-i21k':
        config.model.update(dropout=0.1)
        optim = dict(optim, weight_decay=0.03)
    train, val = SPLITS[name]
    config.data = dict(
        source=dict(name=name, split=train), view=dict(name='inception'), image_size=224,
        batch_size=batch_size,
    )  # fmt: skip
    config.mesh = mesh
    loss = 'sigmoid' if name.startswith('jft') else 'softmax'
    config.objective = dict(loss=loss)
    config.evals = dict(
        val=dict(source=dict(name=name, split=val), view='central', loss=loss, every=20_000)
    )
    config.optim = optim
    config.checkpoint = dict(every=5_000)
    config.report = dict(every=100)
    return config
