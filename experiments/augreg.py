"""AugReg pre-training (arXiv:2106.10270): FILE:MODEL-DATA[-AUGMENTATION-wd_DECAY-do_RATE].

Published accuracy on ImageNet without fine-tuning (table 3, best of the grid): 79.00% (s/16-i1k300)
and 79.84% (b/16-i1k300). Not yet run here.

MODEL is one of ti/16, s/32, s/16, b/32, b/16, l/16, r+ti/16, r26+s/32, r50+l/32; DATA is i1k300,
i21k30 or i21k300 (ImageNet for 300 epochs, ImageNet-21k for 30 or 300); AUGMENTATION is none,
light1, light2, medium1, medium2, strong1 or strong2; DECAY, the weight decay, is 0.1 or 0.03; RATE,
that of dropout and stochastic depth, is 0.0 or 0.1. These are the names of the paper (section 3.3).
The files of its checkpoints say light0 and light1 for light1 and light2: their index has none,
light0, light1, medium1, ... (vision_transformer, vit_jax_augreg.ipynb, cell "Upstream AugReg
parameters").

MODEL-DATA alone is the best of the 28 points by validation accuracy, as the paper's tables take it
(section 4.5, figure 4): the one of a public checkpoint where that is known (`BEST`), else the point
that launch.sh --select finds, which runs them all. A plain run of it has big_vision's augmentation
(configs/vit_i1k.py:77-84, vit_i21k.py:65-72, hybrids as the ViTs of their size with patches of 16),
a decay of 0.1 and no dropout.

The recipe follows big_vision's configs, which its issue 60 names: a sigmoid for each class, of
which the head's bias begins at -6.9 or -10, Adam with momentum in bfloat16, batches of 4,096, a
rate of 0.001 with cosine decay after 10,000 steps of warm-up, gradients clipped at norm 1, 224 px.
Models of ImageNet have a hidden layer in the head (vit_i1k.py:123); the paper has both (section
3.2), and MODEL-DATA-POINT-linear has none. Class token and positions are those of the public
checkpoints; vit_i21k.py:102 has the mean of the patches. To fine-tune:
experiments/finetune_augreg.py:imagenet2012,s/16-i1k300.
"""

import itertools
import re

from ml_collections import ConfigDict

from vit_jax.data import distort
from vit_jax.errors import UserError, choices
from vit_jax.tables import published

MODELS = {  # width; augmentation of big_vision's configs on ImageNet, on ImageNet-21k
    'ti/16': (192, 'light1', 'none'), 's/32': (384, 'medium1', 'none'),
    's/16': (384, 'medium2', 'light1'), 'b/32': (768, 'medium2', 'light2'),
    'b/16': (768, 'medium2', 'light2'), 'l/16': (1024, 'medium2', 'medium2'),
    'r+ti/16': (192, 'light1', 'none'), 'r26+s/32': (384, 'medium2', 'light1'),
    'r50+l/32': (1024, 'medium2', 'medium2'),
}  # fmt: skip
DATA = {  # TFDS, training, validation, epochs, bias of the head
    'i1k300': ('imagenet2012', 'train[:99%]', 'train[99%:]', 300, -6.9),
    'i21k30': ('imagenet21k', 'full[51200:]', 'full[25600:51200]', 30, -10.0),
    'i21k300': ('imagenet21k', 'full[51200:]', 'full[25600:51200]', 300, -10.0),
}
BEST = {  # by names of checkpoints: vision_transformer README.md:217-225; timm's of ImageNet alone
    'l/16-i21k300': 'strong1-wd_0.1-do_0.0', 'b/16-i21k300': 'medium1-wd_0.1-do_0.0',
    's/16-i21k300': 'light2-wd_0.03-do_0.0', 'r50+l/32-i21k300': 'medium1-wd_0.1-do_0.1',
    'r26+s/32-i21k300': 'light2-wd_0.1-do_0.0', 'ti/16-i21k300': 'none-wd_0.03-do_0.0',
    'b/32-i21k300': 'light2-wd_0.1-do_0.0', 's/32-i21k300': 'none-wd_0.1-do_0.0',
    'r+ti/16-i21k300': 'none-wd_0.03-do_0.0', 's/16-i1k300': 'medium2-wd_0.1-do_0.0',
    'b/32-i1k300': 'medium2-wd_0.1-do_0.1', 'b/16-i1k300': 'strong2-wd_0.1-do_0.1',
}  # fmt: skip
FIGURE_4 = ('b/16', 'r26+s/32', 's/16', 'ti/16')  # whose best upstream is known, on ImageNet
GRID = [
    f'{augmentation}-wd_{decay}-do_{rate}'
    for augmentation, decay, rate in itertools.product(distort.AUGREG, (0.1, 0.03), (0.0, 0.1))
]
PAIRS = [f'{model}-{data}' for model in MODELS for data in DATA]
ARGS = (*PAIRS, *(f'{pair}-{point}' for pair in PAIRS for point in GRID))


def get_config(arg='s/16-i1k300'):
    whole = arg.removesuffix('-linear')
    model, data, *_ = *whole.split('-'), ''
    pair = f'{model}-{data}'
    if whole not in ARGS or whole == pair != arg:
        raise UserError(f'no argument {arg!r}; {choices(arg, ARGS)}')
    width, *usual = MODELS[model]
    usual = f'{usual[data != "i1k300"]}-wd_0.1-do_0.0'
    point = whole.removeprefix(pair).lstrip('-') or BEST.get(pair, usual)
    augmentation, decay, rate = re.fullmatch(r'(\w+)-wd_([\d.]+)-do_([\d.]+)', point).groups()
    name, train, val, epochs, bias = DATA[data]
    preset, rate = distort.AUGREG[augmentation], float(rate)

    config = ConfigDict()
    config.seed = 0
    config.epochs = epochs

    root, _, size = model.rpartition('+')
    config.model = dict(
        name=f'{root}+vit-{size}' if root else f'vit-{size}', dropout=rate, drop_path=rate,
        head_bias=bias, matmul_dtype='bfloat16', posemb_std=0.02,
        representation_size=width if data == 'i1k300' and arg == whole else None,
    )  # fmt: skip
    config.data = dict(
        source=dict(name=name, split=train),
        view=dict(name='inception', antialias=False), image_size=224,
        batch_size=4096, augment=preset['augment'],
    )  # fmt: skip
    config.objective = dict(loss='sigmoid', mixup=preset['mixup'])
    config.evals = dict(
        val=dict(source=dict(name=name, split=val), view='small_central', every=20_000)
    )
    if data == 'i1k300':
        config.evals.test = dict(
            source=dict(name=name, split='validation'), view='small_central', every=20_000
        )
    config.optim = dict(
        name='adamw', lr=1e-3, warmup=10_000, weight_decay=float(decay), clip=1.0,
        momentum_dtype='bfloat16',
    )  # fmt: skip
    config.checkpoint = dict(every=5_000)
    config.report = dict(every=100)

    if arg == pair and pair not in BEST:
        points = [{'arg': f'{pair}-{point}'} for point in GRID]
        config.select = dict(metric='val/accuracy', grid=points)
    if arg == pair and data == 'i1k300':
        row = model.upper().replace('TI', 'Ti')
        config.expected = [published.expected(
            'augreg.table3', row, 'i1k_up (no adaptation)', 'test/accuracy', tolerance=0.01
        )]  # fmt: skip
        if model in FIGURE_4:
            config.expected.append(published.expected(
                'augreg.figure4', row, 'ImageNet, 300 epochs', 'val/accuracy', tolerance=0.01
            ))  # fmt: skip
    return config
