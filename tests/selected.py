"""A selection of seconds on scikit-learn's digits: of a rate, on a part of the training images."""

from ml_collections import ConfigDict


def get_config(arg='dev'):
    digits = lambda split: dict(source=dict(name='digits', split=split), batch_size=256)  # noqa: E731
    config = ConfigDict()
    config.seed = 0
    config.steps = 30
    config.model = dict(name='vit-ti/4', width=32, depth=2, num_heads=2, mlp_dim=64)
    config.data = dict(
        source=dict(name='digits', split='train'), view='resize', image_size=8, batch_size=64
    )
    config.evals = dict(test=digits('test'))
    config.optim = dict(lr=1e-5, warmup=5)
    config.checkpoint = dict(every=10)
    config.report = dict(every=5)
    config.expected = [dict(metric='test/accuracy', value=0.5, tolerance=0.5, source='no paper')]
    config.select = dict(
        metric='val/accuracy', grid=[{'optim.lr': lr} for lr in (1e-4, 3e-3, 1e38)]
    )
    if arg == 'dev':
        config.select.split = 'train[:90%]'
        config.select.evals = dict(val=digits('train[90%:]'))
    else:  # nothing is trained anew: the best run is the result
        config.select.metric = 'test/accuracy'
    return config
