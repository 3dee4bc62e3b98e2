"""Two small towers on the images with captions of test_words_runs.write, a folder."""

from ml_collections import ConfigDict

SMALL = dict(width=16, depth=1, num_heads=2, mlp_dim=16)


def get_config(folder):
    config = ConfigDict()
    config.seed, config.steps = 3, 24
    config.model = dict(name='vit/4', num_classes=8, **SMALL)
    config.objective = dict(
        name='contrastive', text=dict(causal=True, pool='eos', **SMALL), micro_batches=2
    )
    source = dict(name=f'{folder}/data')
    config.data = dict(
        task='image_text', source=source | {'label': None}, image_size=8, view='resize',
        batch_size=16, tokenizer=f'{folder}/tokens',
    )  # fmt: skip
    config.optim = dict(lr=1e-3)
    config.evals = dict(
        zero=dict(type='zero_shot', source=source, templates=('a photo of the {}', '{} bag')),
        found=dict(type='retrieval', source=source | {'label': None}, captions=2, k=(1, 3)),
    )
    config.checkpoint = dict(every=4)
    config.report = dict(every=4)
    return config
