"""A run of DINO of seconds, on the folder of images that is its argument."""

from ml_collections import ConfigDict


def get_config(folder):
    config = ConfigDict()
    config.seed, config.steps = 3, 24
    config.model = dict(
        name='vit/4', width=16, depth=2, num_heads=2, mlp_dim=32, drop_path=0.1, gelu='exact',
        interpolation='bicubic',
    )
    config.objective = dict(
        name='dino', prototypes=64, hidden=16, bottleneck=8, scaled=True, teacher_momentum=0.9,
        teacher_temperature=0.07, temperatures=3, temperature_steps=4,
    )
    config.data = dict(
        task='crops', source=dict(name=folder), image_size=16, local_size=8, local_count=3,
        batch_size=8,
    )
    config.evals = dict(knn=dict(
        type='probe', source=dict(name=folder, split='val'), train_source=dict(name=folder),
        k=(3,), l2=None, every=12,
    ))  # fmt: skip
    config.optim = dict(
        lr=3e-3, warmup=5, weight_decay=0.04, weight_decay_end=0.4, clip=3.0, clip_by='array',
        decay=('kernel$', 'posemb$', 'cls$', 'prototypes/'), hold='prototypes/', hold_steps=6,
    )
    config.checkpoint = dict(every=4, best='knn/3_nn_cosine', keep=2)
    config.report = dict(every=1)
    return config
