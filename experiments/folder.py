"""ViT on a folder of images, PATH/class/*.jpg: --config experiments/folder.py:PATH.

A starting point for your own data: training from scratch, small enough for a CPU. There are no
published results to compare with, so none are expected. Uses PATH/train/ and PATH/val/ (or valid,
validation, dev) or PATH/test/ if they exist; else holds out a tenth of the images, chosen by a hash
of their names. PATH can be any data set that data.source.name accepts.
"""

from ml_collections import ConfigDict

from vit_jax.data import sources


def get_config(path):
    train, held_out = sources.held_out(path)

    config = ConfigDict()
    config.seed = 0
    config.epochs = 30

    config.model = dict(name='vit-ti/8', depth=6, drop_path=0.1)
    config.data = dict(
        source=dict(name=path, split=train),
        view=dict(name='inception', area=(0.35, 1.0)),
        image_size=64,
        batch_size=32,
    )
    config.evals = {
        name: dict(source=dict(name=path, split=split), view='central', every=200)
        for name, split in held_out.items()
    }

    config.objective = dict(label_smoothing=0.1)
    config.optim = dict(lr=1e-3, warmup=10, weight_decay=0.1, clip=1.0)
    config.checkpoint = dict(every=200)
    config.report = dict(every=20)
    return config
