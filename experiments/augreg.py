"""AugReg pre-training (arXiv:2106.10270): FILE:MODEL-DATA[-AUGMENTATION-wd_DECAY-do_RATE].

Published accuracy on ImageNet without fine-tuning (table 3, best of the grid): 79.00% (s/16-i1k300)
and 79.84% (b/16-i1k300). Not yet run here.

Arguments follow the names of AugReg's checkpoints: s/16-i21k300-light1-wd_0.03-do_0.0. MODEL is one
of ti/16, s/32, s/16, b/32, b/16, l/16, r+ti/16, r26+s/32, r50+l/32; DATA is i1k300, i21k30 or
i21k300 (ImageNet for 300 epochs, ImageNet-21k for 30 or 300); AUGMENTATION is none, light1, light2,
medium1, medium2, strong1 or strong2; DECAY, the weight decay, is 0.1 or 0.03; RATE, that of dropout
and stochastic depth, is 0.0 or 0.1. The whole grid has 28 runs for each MODEL-DATA. A sweep takes
one command:

    bash launch.sh slurm ... experiments/augreg.py:s/16-i1k300 --sweep optim.weight_decay=0.1,0.03

The last three default to those of the best public checkpoint if there is one (`BEST`), else to
medium1, 0.1 and 0.0. The recipe has Adam, batches of 4,096, a learning rate of 0.001 with cosine
decay after 10,000 steps of warm-up, gradients clipped at norm 1, and 224 px. To fine-tune:
experiments/finetune.py:imagenet2012,augreg:s/16-i1k300,384.
"""

import itertools
import re

from ml_collections import ConfigDict

from vit_jax.data import distort
from vit_jax.errors import UserError, choices
from vit_jax.tables import published

MODELS = ('ti/16', 's/32', 's/16', 'b/32', 'b/16', 'l/16', 'r+ti/16', 'r26+s/32', 'r50+l/32')
DATA = {  # TFDS, training, validation, epochs
    'i1k300': ('imagenet2012', 'train[:99%]', 'train[99%:]', 300),
    'i21k30': ('imagenet21k', 'full[0.4%:]', 'full[:0.4%]', 30),
    'i21k300': ('imagenet21k', 'full[0.4%:]', 'full[:0.4%]', 300),
}
BEST = {  # from the names of google-research/vision_transformer's recommended checkpoints
    'l/16-i21k300': 'strong1-wd_0.1-do_0.0', 'b/16-i21k300': 'medium1-wd_0.1-do_0.0',
    's/16-i21k300': 'light1-wd_0.03-do_0.0', 'r50+l/32-i21k300': 'medium1-wd_0.1-do_0.1',
    'r26+s/32-i21k300': 'light1-wd_0.1-do_0.0', 'ti/16-i21k300': 'none-wd_0.03-do_0.0',
    'b/32-i21k300': 'light1-wd_0.1-do_0.0', 's/32-i21k300': 'none-wd_0.1-do_0.0',
    'r+ti/16-i21k300': 'none-wd_0.03-do_0.0', 'b/32-i1k300': 'medium2-wd_0.1-do_0.1',
}  # fmt: skip
USUAL = 'medium1-wd_0.1-do_0.0'
GRID = [
    f'{augmentation}-wd_{decay}-do_{rate}'
    for augmentation, decay, rate in itertools.product(distort.AUGREG, (0.1, 0.03), (0.0, 0.1))
]
PAIRS = [f'{model}-{data}' for model in MODELS for data in DATA]
ARGS = (*PAIRS, *(f'{pair}-{point}' for pair in PAIRS for point in GRID))


def get_config(arg='s/16-i1k300'):
    model, data, *_ = *arg.split('-'), ''
    pair = f'{model}-{data}'
    point = arg.removeprefix(pair).lstrip('-') or BEST.get(pair, USUAL)
    if f'{pair}-{point}' not in ARGS:
        raise UserError(f'no argument {arg!r}; {choices(arg, ARGS)}')
    found = re.fullmatch(r'(\w+)-wd_([\d.]+)-do_([\d.]+)', point)
    name, train, val, epochs = DATA[data]
    preset = distort.AUGREG[found[1]]
    rate = float(found[3])

    config = ConfigDict()
    config.seed = 0
    config.epochs = epochs

    root, _, size = model.rpartition('+')
    config.model = dict(
        name=f'{root}+vit-{size}' if root else f'vit-{size}', dropout=rate, drop_path=rate,
        dtype='bfloat16',
    )  # fmt: skip
    config.data = dict(
        source=dict(name=name, split=train), view='inception', image_size=224, batch_size=4096,
        augment=preset['augment'],
    )  # fmt: skip
    config.objective = dict(mixup=preset['mixup'])
    config.evals = dict(
        val=dict(source=dict(name=name, split=val), view='small_central', every=20_000)
    )
    if data == 'i1k300':
        config.evals.test = dict(
            source=dict(name=name, split='validation'), view='small_central', every=20_000
        )
    config.optim = dict(
        name='adamw', lr=1e-3, warmup=10_000, weight_decay=float(found[2]), clip=1.0
    )
    config.checkpoint = dict(every=5_000)
    config.report = dict(every=100)

    if arg.endswith('-i1k300'):
        config.expected = [published.expected(
            'augreg.table3', model.upper().replace('TI', 'Ti'), 'i1k_up (no adaptation)',
            'test/accuracy', tolerance=0.01,
        )]  # fmt: skip
    return config
