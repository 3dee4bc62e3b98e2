"""Position embeddings of ViT-B/16 (arXiv:2010.11929 table 8): FILE:none, 1d, 2d, rel, 1d-layers,
2d-layers, 1d-shared, 2d-shared.

Published accuracy of least squares on 5 images of each class of ImageNet, in percent; not yet run
here:

                    at the stem   at each layer   at each layer, shared
    none               61.38
    1-D                64.21          63.96              64.29
    2-D                64.00          64.05              64.02
    relative           64.03

The pre-training is that of experiments/pretrain.py:b/16, as the paper names no other data or
length, with the hidden layer in the head that section D.3 has throughout; few shots read its
output. Their images and penalty are those of big_vision configs/common_fewshot.py:20-54. JFT is not
public: --config.data.source.name=PATH sets other data.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

JFT_300M = 'jft_like:303000000x18291'  # arXiv:2010.11929 section 4.1
KINDS = {'none': ('none', 'No Pos. Emb.'), '1d': ('learn', '1-D Pos. Emb.'),
         '2d': ('learn2d', '2-D Pos. Emb.'), 'rel': ('relative', 'Rel. Pos. Emb.')}  # fmt: skip
PLACES = {'stem': 'Default/Stem', 'layers': 'Every Layer', 'shared': 'Every Layer-Shared'}
ARGS = ('none', '1d', '2d', 'rel', '1d-layers', '2d-layers', '1d-shared', '2d-shared')


def get_config(arg='1d'):
    check_choice('argument', arg, ARGS)
    kind, _, place = arg.partition('-')
    place = place or 'stem'
    posemb, row = KINDS[kind]

    config = ConfigDict()
    config.seed = 0
    config.epochs = 7

    config.model = dict(
        name='vit-b/16', posemb=posemb, posemb_at=place, representation_size=768, posemb_std=0.02,
        head_bias=-10.0, matmul_dtype='bfloat16',
    )  # fmt: skip
    config.data = dict(
        source=dict(name=JFT_300M, split='train'),
        view=dict(name='inception', antialias=False), image_size=224,
        batch_size=4096,
    )  # fmt: skip
    config.evals = dict(
        imagenet=dict(
            type='probe', train_source=dict(name='imagenet2012', split='train[:65000]'),
            source=dict(name='imagenet2012', split='validation'),
            view=dict(name='resize', crop=224 / 256, antialias=False),
            shots=(5,), seeds=3, shot_l2=1024.0, k=(), l2=None,
        )
    )  # fmt: skip
    config.objective = dict(loss='sigmoid')
    config.optim = dict(
        name='adamw', schedule='linear', warmup=10_000, lr=8e-4, end_lr=1e-5, weight_decay=0.1
    )
    config.checkpoint = dict(every=5_000)
    config.report = dict(every=100)

    config.expected = [published.expected(
        'vit.table8', row, PLACES[place], 'imagenet/5_shot', scale=1, tolerance=0.005
    )]  # fmt: skip
    return config
