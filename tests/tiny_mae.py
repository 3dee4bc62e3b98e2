"""A masked autoencoder that trains for seconds, on the folder of images that is its argument."""

from ml_collections import ConfigDict


def get_config(folder):
    config = ConfigDict()
    config.seed, config.steps = 2, 12
    config.model = dict(
        name='vit-ti/4', width=16, depth=2, num_heads=2, mlp_dim=32, posemb='sincos2d_moco',
        drop_path=0.1,
    )  # fmt: skip
    config.objective = dict(
        name='mae', decoder_width=12, decoder_depth=1, decoder_heads=2, normalise=False,
    )
    config.data = dict(
        source=dict(name=folder), image_size=[16, 8], batch_size=8,
        view=dict(name='shift', pixels=1, flip=True),
    )  # fmt: skip
    source = dict(name=folder, split='val')
    config.evals = dict(probe=dict(
        type='probe', source=source, train_source=dict(name=folder), view='resize', k=(1,),
        batch_size=8, every=6,
    ))  # fmt: skip
    config.optim = dict(lr=1e-2, warmup=2, b2=0.95)
    config.checkpoint = dict(every=4)
    config.report = dict(every=1)
    return config
