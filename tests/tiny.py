"""A run of seconds, on the folder of images that is its argument."""

from ml_collections import ConfigDict


def get_config(folder):
    config = ConfigDict()
    config.seed = 1
    config.steps = 60
    config.model = dict(
        name='vit-ti/4', width=16, depth=2, num_heads=2, mlp_dim=32, dropout=0.1, drop_path=0.1
    )
    config.data = dict(
        source=dict(name=folder), view=dict(name='shift', pixels=1, flip=True), image_size=8,
        batch_size=8,
    )
    config.evals = dict(val=dict(source=dict(name=folder, split='val'), every=20, batch_size=1))
    config.optim = dict(lr=3e-3, warmup=5, weight_decay=0.1, clip=1.0, ema=0.9)
    config.checkpoint = dict(every=7)
    config.report = dict(every=1)
    return config
