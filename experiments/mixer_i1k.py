"""Mixer-B/16 on ImageNet-1k for 300 or 60 epochs (FILE:300, 60): 76.3 and 70.5%.

These are published in big_vision configs/mlp_mixer_i1k.py. Not yet run here.

The recipe has batches of 4,096, Adam with a learning rate of 0.001 and a weight decay of 0.0001
scaled by the schedule only (so 0.1 of the learning rate), 10,000 steps of warm-up, linear decay to
1e-5 of the rate, clipping at norm 1, a sigmoid for each class, of which the head's bias begins at
-6.9, RandAugment(2, 15), mixup 0.5 and stochastic depth up to 0.1.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

ARGS = ('300', '60')


def get_config(arg='300'):
    check_choice('argument', arg, ARGS)

    config = ConfigDict()
    config.seed = 0
    config.epochs = int(arg)

    config.model = dict(
        name='mixer-b/16', drop_path=0.1, head_bias=-6.9, matmul_dtype='bfloat16'
    )
    config.data = dict(
        source=dict(name='imagenet2012', split='train[:99%]'),
        view=dict(name='inception', antialias=False), image_size=224,
        batch_size=4096, augment=(dict(name='randaugment', layers=2, magnitude=15),),
    )  # fmt: skip
    config.objective = dict(loss='sigmoid', mixup=0.5)

    def evaluation(name, split, every, **source):
        return dict(
            source=dict(name=name, split=split, **source), view='small_central', every=every
        )

    config.evals = dict(
        minival=evaluation('imagenet2012', 'train[99%:]', 2500),
        val=evaluation('imagenet2012', 'validation', 2500),
        real=evaluation('imagenet2012_real', 'validation', 0, label='real_label'),
        v2=evaluation('imagenet_v2/matched-frequency', 'test', 0),
    )
    config.optim = dict(
        name='adamw', lr=1e-3, schedule='linear', end_lr=1e-8, warmup=10_000, weight_decay=0.1,
        clip=1.0,
    )  # fmt: skip
    config.checkpoint = dict(every=2500)
    config.report = dict(every=50)

    config.expected = [published.expected(
        'bv.mixer', ('Mixer-B/16', int(arg)), 'top-1', 'val/accuracy', tolerance=0.003
    )]  # fmt: skip
    return config
