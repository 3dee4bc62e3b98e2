"""Linear classifiers on DINO's features (FILE:s/16,100 ... FILE:b/16,400): 74.0 to 78.2%.

Published by the README of facebookresearch/dino (arXiv:2104.14294), on ImageNet-1k: 74.0, 76.0 and
77.0% for s/16 after 100, 300 and 800 epochs of experiments/dino.py, 78.2% for b/16 after 400. Not
yet run here.

The recipe is the authors' eval_linear.py: a linear layer reads the class tokens of the last four
blocks after the last norm (s/16), or the last class token and the mean of the patches (b/16), and
trains for 100 epochs by SGD with batches of 1,024, a rate of 0.001 per 256 images, momentum 0.9, no
weight decay, random resized crops and flips. The script recommends to tune the rate for each
checkpoint, and the released models' are not stated. Its cosine falls once an epoch, here with each
step, and it reports the best epoch, this recipe the last.

--config.init_from=hf://facebook/dino-vits16 begins from the public weights.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

RUNS = {  # rows of the published table
    's/16,100': 'ViT-S/16, 100 epochs', 's/16,300': 'ViT-S/16, 300 epochs',
    's/16,800': 'ViT-S/16, released', 'b/16,400': 'ViT-B/16, released',
}  # fmt: skip
ARGS = tuple(RUNS)


def get_config(arg='s/16,300'):
    check_choice('argument', arg, ARGS)
    name, _ = arg.split(',')
    features = dict(pool='cls_gap', blocks=1) if name == 'b/16' else dict(pool='cls', blocks=4)

    config = ConfigDict()
    config.seed = 0
    config.epochs = 100

    config.model = dict(
        name=f'vit-{name}', gelu='exact', interpolation='bicubic', mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    config.init_from = f'runs/dino/{arg.replace("/", "_")}'
    config.objective = dict(name='token_probe', **features)
    config.data = dict(
        source=dict(name='imagenet2012', split='train'), view='inception_torchvision',
        image_size=224, batch_size=1024,
    )  # fmt: skip
    view = dict(
        name='small_central', smaller=256, method='bicubic', antialias=True,
        rounding='torchvision',
    )  # fmt: skip
    config.evals = dict(test=dict(
        source=dict(name='imagenet2012', split='validation'), view=view, every=10_000
    ))  # fmt: skip
    config.optim = dict(
        name='sgd', momentum=0.9, lr=0.001 * 1024 / 256, only=('^probe/',), schedule='cosine'
    )
    config.checkpoint = dict(every=1251)
    config.report = dict(every=100)
    config.expected = [published.expected('dino.readme', RUNS[arg], 'linear', 'test/accuracy')]
    return config
