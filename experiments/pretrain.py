"""Pre-training by arXiv:2010.11929 table 3: FILE:MODEL, FILE:MODEL-i21k, FILE:MODEL-i1k.

Published after fine-tuning on ImageNet (table 2, experiments/finetune.py): 88.55 (h/14), 87.76
(l/16) and 85.30% (l/16-i21k), for 2,500, 680 and 230 TPUv3-core-days. Not yet run here. To plan a
run:

    python -m vit_jax.plan --config experiments/pretrain.py:h/14 --topology v4:8x8x16

MODEL is one of b/32, b/16, l/32, l/16, h/14, the ResNets r50x1, r50x2, r101x1, r152x1, r152x2,
r200x3 and the hybrids r50+b/32, r50+b/16, r50+l/32, r50+l/16: the rows of tables 5 and 6. It trains
on JFT-300M, with -i21k on ImageNet-21k, with -i1k on ImageNet. -7ep sets the number of epochs, as
the paper has several for some models. The recipe has batches of 4,096, Adam, 10,000 steps of
warm-up and 224 px. What the paper leaves out is from vision_transformer's issues: a sigmoid per
class (34), of which the head's bias begins at -10 and linear decay ends at 1e-5 (2), and on
ImageNet labels smoothed by 1e-4 (89, 153); big_vision has -6.9 for 1,000 classes
(configs/vit_i1k.py:72). Products are of bfloat16 and all else of float32, as on the TPUs of these
runs.

-9m, -30m and -90m (b/32-30m) are figure 4: as many steps on a share of JFT, the best checkpoint by
validation accuracy, and few shots of ImageNet. The paper has its numbers in the figure alone.

ResNets with -sgd are those of table 7, which refers to arXiv:1912.11370: a rate of 0.03 per 256
images, divided by ten four times in 40 epochs, 5,000 steps of warm-up and an L2 penalty of 1e-4 in
the gradient. Their length, 7 epochs as with Adam, is a choice.

h/14-i21k is not in table 3 and has the settings of l/16. G/14 is that of arXiv:2106.04560: 84.86%
with ten shots of ImageNet, 90.45% after fine-tuning. It follows big_vision
configs/proj/scaling_laws/train_vit_g.py, which says so of g/14: Adafactor, 1,000,000 steps of
16,384 images, a reciprocal square root, decay of the head 100 times that of the body. e/14 is that
of arXiv:2209.06794 with the same settings; the paper runs the last 100,000 steps twice and averages
the two models, this recipe has one cool-down of 50,000 steps.

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
DATA = {  # name, split for training, split for validation
    'jft': (JFT_300M, 'train', 'test[:0.1%]'),
    'jft3b': (JFT_3B, 'train', 'test[:0.01%]'),
    'i21k': ('imagenet21k', 'full[51200:]', 'full[25600:51200]'),  # big_vision vit_i21k.py:77-126
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
SHARES = {'9m': 2.970297, '30m': 9.90099, '90m': 29.70297}  # percent of 303 million, figure 4
SUBSETS = ('b/32', 'l/32', 'l/16', 'r50x1', 'r152x2')  # of its models all but a narrower B/32
LARGE = dict(
    name='adafactor', schedule='rsqrt', warmup=10_000, timescale=10_000, cooldown=50_000, lr=8e-4,
    momentum_dtype='bfloat16', weight_decay=0.03, decay_factors=(('^head/', 100.0),), clip=1.0,
)  # fmt: skip
LATER = {'G/14': dict(fsdp=8), 'e/14': dict(fsdp=16)}  # and their meshes
DAYS = {'h/14': 'Ours-JFT (ViT-H/14)', 'l/16': 'Ours-JFT (ViT-L/16)',
        'l/16-i21k': 'Ours-I21k (ViT-L/16)'}  # fmt: skip
ARGS = (
    *JFT, 'l/16-7ep', 'r152x2-14ep', 'r50+l/16-7ep', 'r50x1-sgd', 'r152x2-sgd',
    *(f'{m}-{data}' for data in ('i21k', 'i1k') for m in ('b/32', 'b/16', 'l/32', 'l/16')),
    'h/14-i21k', 'r50+b/16-i21k', *(f'{m}-{n}' for m in SUBSETS for n in SHARES), *LATER,
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
    adam = dict(name='adamw', schedule='linear', warmup=10_000, end_lr=1e-5)
    if sgd:
        return epochs, {}, dict(
            name='sgd', momentum=0.9, lr=0.03 * 4096 / 256, warmup=5_000, weight_decay=1e-4,
            decay_kind='l2', schedule='step', boundaries=(0.25, 0.575, 0.75, 0.925),
        )  # fmt: skip
    if data == 'jft':
        return epochs, {}, dict(adam, lr=lr, weight_decay=0.1)
    if data == 'i21k':
        return 90, dict(dropout=0.1), dict(adam, lr=1e-3, weight_decay=0.03)
    optim = dict(adam, schedule='cosine', end_lr=0.0, lr=3e-3, weight_decay=0.3, clip=1.0)
    return 300, dict(dropout=0.1), optim


def claims(model, data, epochs):
    """Published costs of the pre-training, as lines of `expected`."""
    rows = []
    if data == 'jft':
        cell = 'vit.table6', (JFT[model][0], epochs), 'exaFLOPs', 'exaflops'
        rows.append(published.expected(*cell, scale=1, tolerance=0))
        rows[0]['tolerance'] = 0.03 * rows[0]['value']
    days = DAYS.get(model if data == 'jft' else f'{model}-{data}')
    if days and epochs in (14, 90):
        rows.append(published.expected(
            'vit.table2', 'TPUv3-core-days', days, 'tpu_core_days', scale=1, tolerance=0
        ))  # fmt: skip
    return rows


def few_shots(shots, every):
    """Least squares on a few images of each class (big_vision configs/common_fewshot.py:20-54)."""
    return dict(
        type='probe', train_source=dict(name='imagenet2012', split='train[:65000]'),
        source=dict(name='imagenet2012', split='validation'),
        view=dict(name='resize', crop=224 / 256, antialias=False),
        shots=shots, seeds=3, shot_l2=1024.0, k=(), l2=None, every=every,
    )  # fmt: skip


def get_config(arg='b/16'):
    match = re.fullmatch(r'([^-]+)(?:-(i21k|i1k|9m|30m|90m))?(?:-(\d+)ep)?(-sgd)?', arg)
    model, data, given, sgd = match.groups() if match else (None,) * 4
    if model not in {*JFT, *LATER} or model in LATER and arg != model:
        raise UserError(f'{arg!r} is none of {", ".join(ARGS)}')
    share = SHARES.get(data)
    data = 'jft3b' if model in LATER else 'jft' if share else data or 'jft'

    config = ConfigDict()
    config.seed = 0
    config.mesh = LATER.get(model, {})
    if model in LATER:
        config.steps, fields, optim = 1_000_000, dict(pool='map'), LARGE
    else:
        epochs, fields, optim = settings(model, data, sgd)
        epochs = int(given or epochs)
        config.update(dict(steps=7 * 303_000_000 // 4096) if share else dict(epochs=epochs))
        if not model.startswith('r') or '+' in model:  # a hidden layer in the head, section 3.1
            width = {'b': 768, 'l': 1024, 'h': 1280}[model.rpartition('+')[2][0]]
            fields |= dict(representation_size=width, posemb_std=0.02)
        config.expected = claims(model, data, epochs) if arg in ARGS and not (sgd or share) else []

    config.model = dict(
        name=model_name(model), head_bias=-10.0, matmul_dtype='bfloat16', **fields
    )
    name, train, val = DATA[data]
    config.data = dict(
        source=dict(name=name, split=f'train[:{share}%]' if share else train),
        view=dict(name='inception', antialias=False), image_size=224,
        batch_size=16_384 if model in LATER else 4096,
    )  # fmt: skip
    config.objective = dict(loss='sigmoid', label_smoothing=1e-4 if data == 'i1k' else 0.0)
    config.evals = dict(
        val=dict(source=dict(name=name, split=val), view='small_central', every=20_000)
    )
    if data == 'i1k':
        config.evals.test = dict(
            source=dict(name=name, split='validation'), view='small_central', every=20_000
        )
    if model in LATER or share:
        shots = (1, 5, 10, 25) if model in LATER else (5,)
        config.evals.imagenet = few_shots(shots, 10_000 if model in LATER else 20_000)
    if model == 'G/14':
        config.expected = [published.expected(
            'scalingvit.g14_verified', 'ViT-G/14 ImageNet 10-shot linear', 'value',
            'imagenet/10_shot',
        )]  # fmt: skip
    config.optim = optim
    config.checkpoint = dict(every=5_000, best='val/accuracy' if share else None)
    config.report = dict(every=100)
    return config
