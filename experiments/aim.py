"""AIM (arXiv:2401.08541): 78.5, 80.6, 82.2 and 82.4% on ImageNet-1k with a frozen encoder.

Published by the README of apple/ml-aim for 0.6b, 1b, 3b and 7b, as "last layer"; "best layer",
79.4, 82.3, 83.3 and 84.0%, reads other blocks, which it does not name. Here: not yet run.

FILE:MODEL predicts the next patch on 2 billion images (0.6b) or 5 billion, FILE:MODEL,probe trains
attention pooling and a linear layer on what it has learnt: on the mean of the last six blocks'
patches, without the last norm, normalised over batch and patches.

Models, head and probe are those of the authors' code: patches of 14 pixels, a norm after their
embedding, no biases in blocks, fixed positions. Images are of DFN-2B (four of five; a folder or
tars, runs/dfn2b) and of ImageNet-1k, as the paper says. Batches of 4,096 and the numbers of images
give 500,000 and 1,200,000 steps. The table of the paper with the other settings could not be read
here: optimizer, rate, decay, clipping, warm-up and the crops of both parts are not verified.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

MODELS = {  # row of the published table, width, depth, heads, steps
    '0.6b': ('AIM-0.6B', 1536, 24, 12, 500_000), '1b': ('AIM-1B', 2048, 24, 16, 1_200_000),
    '3b': ('AIM-3B', 3072, 24, 24, 1_200_000), '7b': ('AIM-7B', 4096, 32, 32, 1_200_000),
}  # fmt: skip
ARGS = (*MODELS, *(f'{model},probe' for model in MODELS))
IMAGENET = dict(name='imagenet2012', split='train')


def get_config(arg='0.6b'):
    check_choice('argument', arg, ARGS)
    model, _, probe = arg.partition(',')
    row, width, depth, heads, steps = MODELS[model]

    config = ConfigDict()
    config.seed = 0

    config.model = dict(
        name='vit/14', width=width, depth=depth, num_heads=heads, mlp_dim=4 * width, pool='gap',
        patch_norm=True, style=dict(unbiased=('query', 'key', 'value', 'out', 'mlp')),
        posemb='sincos2d_moco', gelu='exact', matmul_dtype='bfloat16',
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    view = dict(name='inception_torchvision', method='bicubic')
    centre = dict(
        name='small_central', smaller=256, method='bicubic', antialias=True,
        rounding='torchvision',
    )  # fmt: skip
    test = dict(source=dict(name='imagenet2012', split='validation'), view=centre)
    if probe:
        config.epochs = 100
        config.init_from = f'runs/aim/{model}'
        config.objective = dict(
            name='token_probe', pool='attention', blocks=6, norm=False, batch_norm=True
        )
        config.data = dict(source=IMAGENET, view=view, image_size=224, batch_size=1024)
        config.optim = dict(
            name='adamw', lr=1e-3, weight_decay=0.05, schedule='cosine', warmup=5 * 1251,
            only=('^probe/',),
        )  # fmt: skip
        config.evals = dict(test=dict(test, every=10_000))
        config.checkpoint = dict(every=1251)
        config.expected = [published.expected('aim.readme', row, 'last layer', 'test/accuracy')]
    else:
        config.steps = steps
        config.objective = dict(name='next_patch', head_depth=12, head_width=2048)
        config.data = dict(
            source=dict(mixture=dict(
                dfn2b=dict(name='runs/dfn2b', label=None, weight=0.8),
                imagenet=dict(**IMAGENET, label=None, weight=0.2),
            )),
            view=view | dict(area=(0.4, 1.0)), image_size=224, batch_size=4096,
        )  # fmt: skip
        config.optim = dict(
            name='adamw', lr=1e-3, b2=0.95, weight_decay=0.05, clip=1.0, schedule='cosine',
            warmup=31_250,
        )  # fmt: skip
        config.evals = dict(probe=dict(
            test, type='probe', train_source=dict(name='imagenet2012', split='train[:65000]'),
            k=(20,), every=50_000,
        ))  # fmt: skip
        config.checkpoint = dict(every=2_500)
    config.report = dict(every=100)
    return config
