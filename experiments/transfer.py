"""Transfer of AugReg's ViT-B/32 by big_vision configs/transfer.py: FILE:DATASET.

Published, in percent (means of five runs) with the learning rates that were best on a held-out part
of train; not yet run here:

                        accuracy   rate
    imagenet2012         83.27     0.03
    cifar10              98.55     0.003
    cifar100             91.35     0.01
    oxford_iiit_pet      93.78     0.003
    oxford_flowers102    99.43     0.003

The recipe has SGD with momentum 0.9 in bfloat16, batches of 512, cosine decay, clipping at norm 1
and 384 px, and trains on 90, 98 or 99% of train. CIFAR's images are resized to 448 by area and
cropped, all others have Inception crops; tests see the central 384 of images whose smaller side is
448.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

AREA = dict(name='small_crop', smaller=448)
INCEPTION = dict(name='inception', antialias=False)
DATASETS = {  # row, percent of train to train on, test split, steps, warm-up, rate, view
    'imagenet2012': ('ImageNet', 99, 'validation', 20_000, 500, 0.03, INCEPTION),
    'cifar10': ('Cifar10', 98, 'test', 10_000, 500, 0.003, AREA),
    'cifar100': ('Cifar100', 98, 'test', 10_000, 500, 0.01, AREA),
    'oxford_iiit_pet': ('Pets', 90, 'test', 500, 100, 0.003, INCEPTION),
    'oxford_flowers102': ('Flowers', 90, 'test', 500, 100, 0.003, INCEPTION),
}
ARGS = tuple(DATASETS)


def get_config(arg='cifar10'):
    check_choice('data set', arg, DATASETS)
    row, percent, test, steps, warmup, lr, view = DATASETS[arg]

    config = ConfigDict()
    config.seed = 0
    config.steps = steps

    config.init_from = 'augreg/b_32-i21k'
    config.model = dict(name='vit-b/32')
    config.data = dict(
        source=dict(name=arg, split=f'train[:{percent}%]'), view=view, image_size=384,
        batch_size=512,
    )  # fmt: skip

    def evaluation(name, split, **source):
        return dict(
            source=dict(name=name, split=split, **source), every=steps // 10,
            view=dict(name='small_central', smaller=448),
        )  # fmt: skip

    config.evals = dict(
        val=evaluation(arg, f'train[{percent}%:]'), test=evaluation(arg, test),
    )  # fmt: skip
    if arg == 'imagenet2012':
        config.evals.real = evaluation('imagenet2012_real', 'validation', label='real_label')
        config.evals.v2 = evaluation('imagenet_v2/matched-frequency', 'test')
    config.optim = dict(
        name='sgd', momentum=0.9, momentum_dtype='bfloat16', lr=lr, warmup=warmup, clip=1.0
    )
    config.checkpoint = dict(every=1000)
    config.report = dict(every=50)

    config.expected = [published.expected('bv.transfer', row, 'mean %', 'test/accuracy')]
    return config
