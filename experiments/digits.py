"""ViT on scikit-learn's digits."""

from ml_collections import ConfigDict


def get_config(arg=None):
    config = ConfigDict()
    config.seed = 0
    config.epochs = 2
    config.model = dict(name='vit-ti/2', width=64, depth=4, num_heads=4, mlp_dim=128)
    config.data = dict(
        source=dict(name='digits', split='train'), view=dict(name='shift', pixels=1),
        image_size=8, batch_size=64,
    )
    config.evals = dict(test=dict(source=dict(name='digits', split='test'), every=10))
    config.optim = dict(lr=1e-3, warmup=5)
    config.report = dict(every=5)
    config.checkpoint = dict(every=10)
    return config
