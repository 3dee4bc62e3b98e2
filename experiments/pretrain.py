"""Pre-training by arXiv:2010.11929 table 3: FILE:MODEL, FILE:MODEL-i21k, FILE:MODEL-i1k.

Published after fine-tuning on ImageNet (table 2, experiments/finetune.py): 88.55 (h/14), 87.76
(l/16) and 85.30% (l/16-i21k), for 2,500, 680 and 230 TPUv3-core-days. Not yet run here. To plan a
run:

    python -m vit_jax.plan --config experiments/pretrain.py:h/14 --topology v4:8x8x16

MODEL is one of b/32, b/16, l/32, l/16, h/14, the ResNets r50x1, r50x2, r101x1, r152x1, r152x2,
r200x3 and the hybrids r50+b/32, r50+b/16, r50+l/32, r50+l/16: the rows of tables 5 and 6. It trains
on JFT-300M with a sigmoid per class, with -i21k on ImageNet-21k, with -i1k on ImageNet. -7ep sets
the number of epochs, as the paper has several for some models. The recipe has batches of 4,096,
Adam, 10,000 steps of warm-up and 224 px. ResNets with -sgd are those of table 7: the paper only
refers to arXiv:1912.11370, whose learning rate, 0.03 per 256 images, and weight decay, 1e-4, are
used; cosine decay in place of its steps is a choice of this file.

h/14-i21k is not in table 3 and has the settings of l/16. G/14 is that of arXiv:2106.04560 (90.45%
after fine-tuning): Adafactor with momentum in bfloat16, reciprocal square root schedule with
warm-up and cool-down, attention pooling; e/14 is that of arXiv:2209.06794 with the same settings:
1,000,000 steps of 16,384 images. The epochs of G/14 and the learning rate and weight decay of both
are choices of this file.

JFT is not public. Synthetic images, as many and with as many classes, replace it, so that the
recipes run unchanged. --config.data.source.name=PATH sets other data, with one or several labels
per image.
"""

import re

from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.tables import published

JFT_300M = 'jft_like:303000000x18291'  # arXiv:2010.11929 section 4.1
JFT_3B = 'jft_like:3000000000x29593'  # arXiv:2106.04560 section 3
DATA = {  # name, split for training, split of about 13,000 to 60,000 images for validation
    'jft': (JFT_300M, 'train', 'test[:0.1%]'),
    'jft3b': (JFT_3B, 'train', 'test[:0.01%]'),
    'i21k': ('imagenet21k', 'full[0.4%:]', 'full[:0.4%]'),
    'i1k': ('imagenet2012', 'train[:99%]', 'train[99%:]'),
}
JFT = {  # row of tables 3 and 6, epochs, base learning rate
    'b/32': ('ViT-B/32', 7, 8e-4), 'b/16': ('ViT-B/16', 7, 8e-4),
    'l/32': ('ViT-L/32', 7, 6e-4), 'l/16': ('ViT-L/16', 14, 4e-4),
    'h/14': ('ViT-H/14', 14, 3e-4), 'r50x1': ('ResNet50x1', 7, 1e-3),
    'r50x2': ('ResNet50x2', 7, 1e-3), 'r101x1': ('ResNet101x1', 7, 8e-4),
    'r152x1': ('ResNet152x1', 7, 6e-4), 'r152x2': ('ResNet152x2', 7, 6e-4),
    'r200x3': ('ResNet200x3', 14, 6e-4),  # the rate of r152, as table 3 has none
    'r50+b/32': ('R50x1+ViT-B/32', 7, 8e-4), 'r50+b/16': ('R50x1+ViT-B/16', 7, 8e-4),
    'r50+l/32': ('R50x1+ViT-L/32', 7, 2e-4), 'r50+l/16': ('R50x1+ViT-L/16', 14, 4e-4),
}  # fmt: skip
LARGE = dict(
    name='adafactor', schedule='rsqrt', warmup=10_000, cooldown=50_000, lr=8e-4,
    momentum_dtype='bfloat16', weight_decay=0.03, clip=1.0,
)  # fmt: skip
LATER = {  # data, length, batch size, mesh
    'G/14': ('jft3b', dict(epochs=5), 4096, dict(fsdp=8)),
    'e/14': ('jft3b', dict(steps=1_000_000), 16_384, dict(fsdp=16)),
}
DAYS = {'h/14': 'Ours-JFT (ViT-H/14)', 'l/16': 'Ours-JFT (ViT-L/16)',
        'l/16-i21k': 'Ours-I21k (ViT-L/16)'}  # fmt: skip
ARGS = (
    *JFT, 'l/16-7ep', 'r152x2-14ep', 'r50+l/16-7ep', 'r50x1-sgd', 'r152x2-sgd',
    *(f'{m}-{data}' for data in ('i21k', 'i1k') for m in ('b/32', 'b/16', 'l/32', 'l/16')),
    'h/14-i21k', *LATER,
)  # fmt: skip


def model_name(model):
    """Model name 'vit-b/16', 'bit-r50x1' or 'r50+vit-b/16' for 'b/16', 'r50x1' or 'r50+b/16'."""
    root, _, size = model.rpartition('+')
    if root:
        return f'{root}+vit-{size}'
    return f'bit-{model}' if model.startswith('r') else f'vit-{model}'


def settings(model, data, sgd):
    """(epochs, fields of the model, settings of the optimizer) by table 3."""
    row, epochs, lr = JFT[model]
    adam = dict(name='adamw', schedule='linear', warmup=10_000)
    if sgd:
        decay = dict(schedule='cosine', warmup=10_000, weight_decay=1e-4)
        return epochs, {}, dict(decay, name='sgd', momentum=0.9, lr=0.03 * 4096 / 256)
    if data == 'jft':
        return epochs, {}, dict(adam, lr=lr, weight_decay=0.1)
    if data == 'i21k':
        return 90, dict(dropout=0.1), dict(adam, lr=1e-3, weight_decay=0.03)
    optim = dict(adam, schedule='cosine', lr=3e-3, weight_decay=0.3, clip=1.0)
    return 300, dict(dropout=0.1), optim


def claims(model, data, epochs, sgd):
    """Published costs of the pre-training, as lines of `expected`."""
    rows = []
    if data == 'jft' and not sgd:
        cell = 'vit.table6', (JFT[model][0], epochs), 'exaFLOPs', 'exaflops'
        rows.append(published.expected(*cell, scale=1, tolerance=0))
        rows[0]['tolerance'] = 0.03 * rows[0]['value']
    days = DAYS.get(model if data == 'jft' else f'{model}-{data}')
    if days and not sgd and epochs in (14, 90):
        rows.append(published.expected(
            'vit.table2', 'TPUv3-core-days', days, 'tpu_core_days', scale=1, tolerance=0
        ))  # fmt: skip
    return rows


def get_config(arg='b/16'):
    match = re.fullmatch(r'([^-]+)(?:-(i21k|i1k))?(?:-(\d+)ep)?(-sgd)?', arg)
    model, data, given, sgd = match.groups() if match else (None,) * 4
    if model not in {*JFT, *LATER} or model in LATER and arg != model:
        raise UserError(f'{arg!r} is none of {", ".join(ARGS)}')
    data = data or 'jft'

    config = ConfigDict()
    config.seed = 0
    batch_size, config.mesh = 4096, {}
    if model in LATER:
        data, length, batch_size, config.mesh = LATER[model]
        fields, optim = dict(pool='map'), LARGE
        config.update(length)
    else:
        epochs, fields, optim = settings(model, data, sgd)
        config.epochs = int(given or epochs)
        config.expected = claims(model, data, config.epochs, sgd) if arg in ARGS else []

    config.model = dict(name=model_name(model), dtype='bfloat16', **fields)
    if model not in LATER and not config.model.name.startswith('bit'):
        width = {'b': 768, 'l': 1024, 'h': 1280}[model.rpartition('+')[2][0]]
        config.model.representation_size = width  # a hidden layer in the head, section 3.1
    name, train, val = DATA[data]
    config.data = dict(
        source=dict(name=name, split=train), view=dict(name='inception'), image_size=224,
        batch_size=batch_size,
    )  # fmt: skip
    loss = 'sigmoid' if data.startswith('jft') else 'softmax'
    config.objective = dict(loss=loss)
    config.evals = dict(
        val=dict(source=dict(name=name, split=val), view='central', every=20_000)
    )
    if data == 'i1k':
        config.evals.test = dict(
            source=dict(name=name, split='validation'), view='small_central', every=20_000
        )
    config.optim = optim
    config.checkpoint = dict(every=5_000)
    config.report = dict(every=100)
    return config
