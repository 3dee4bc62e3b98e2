"""Fine-tuning by the protocol of arXiv:2010.11929 (appendix B.1.1): FILE:DATASET and
--config.init_from=ANYTHING that vit_jax.load takes. Here: not yet run on these data sets.

SGD with momentum 0.9 in batches of 512, cosine decay, gradients clipped at norm 1, no weight decay,
384 px, a new head of zeros. Steps are those of table 4 there; warm-up, learning rate, splits and
crops those of big_vision's transfer recipe, which took the rate by validation accuracy for
AugReg's B/32 (arXiv:2106.10270). Any other TFDS name, or the path of a folder of images, has 2,500
steps, as VTAB has. Published, fine-tuned from ImageNet-21k (arXiv:2010.11929 table 5), in percent:

                        B/16    B/32    L/16    L/32    H/14
    cifar10            98.95   98.79   99.16   99.13   99.27
    cifar100           91.67   91.97   93.44   93.04   93.82
    imagenet2012       83.97   81.28   85.15   80.99   85.13
    oxford_flowers102  99.38   99.11   99.61   99.19   99.51
    oxford_iiit_pet    94.43   93.02   94.73   93.09   94.82

One flag each: --config.optim.layer_decay=0.75 (layer-wise rates), --config.optim.only=head (linear
probe), --config.optim.freeze=embedding, --config.model.drop_path=0.1, --config.keep_head=true.
"""

import pathlib

from ml_collections import ConfigDict

PRESETS = {  # the share of `train` to train on, the test split, steps, warm-up, rate, view
    'cifar10': (98, 'test', 10_000, 500, 0.003, 'random_crop'),
    'cifar100': (98, 'test', 10_000, 500, 0.01, 'random_crop'),
    'imagenet2012': (99, 'validation', 20_000, 500, 0.03, 'inception'),
    'oxford_flowers102': (90, 'test', 500, 100, 0.003, 'inception'),
    'oxford_iiit_pet': (90, 'test', 500, 100, 0.003, 'inception'),
}
CROP = 384 / 448  # of the smaller side


def splits(name):
    """{evaluation: split}, the training split first."""
    if name in PRESETS:
        share, test, *_ = PRESETS[name]
        return {'train': f'train[:{share}%]', 'val': f'train[{share}%:]', 'test': test}
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir() and not (folder / 'train').is_dir():
        return {'train': 'train[:90%]', 'val': 'train[90%:]'}
    return {'train': 'train', **({'val': 'val'} if folder.is_dir() else {'test': 'test'})}


def get_config(name='cifar10'):
    *_, steps, warmup, lr, view = PRESETS.get(name, (2_500, 500, 0.01, 'inception'))
    train, *tests = splits(name).items()

    config = ConfigDict()
    config.seed = 0
    config.steps = steps

    config.model = dict()  # read from init_from
    config.data = dict(
        source=dict(name=name, split=train[1]),
        view=dict(name=view, crop=CROP) if view == 'random_crop' else view,
        image_size=384,
        batch_size=512,
    )
    config.evals = {
        part: dict(
            source=dict(name=name, split=split), view=dict(name='central', crop=CROP),
            every=max(steps // 10, 1),
        )
        for part, split in tests
    }  # fmt: skip

    config.optim = dict(name='sgd', momentum=0.9, lr=lr, warmup=warmup, clip=1.0)
    config.checkpoint = dict(every=1000)
    config.report = dict(every=50)
    return config
