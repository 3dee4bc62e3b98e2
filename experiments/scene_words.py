"""Scenes named by their captions, pairs of articles that no caption had among them (FILE:START).

    python -m vit_jax.data.tokenizers --captions scene_captions:0.2 --vocab_size 400 --length 16 \\
      --out runs/scene_words/tokenizer
    python -m vit_jax.main --config FILE:random --workdir runs/scene_words/random

A caption says where the largest article is to the second largest, "a sneaker above a bag". START:

    random  the image tower is a ViT of width 128 and 6 blocks of random weights, at 96 px
    lit     it is the ViT-S/14 of --config.init_from, which stays as it is but for a linear head,
            at 112 px

Evaluations choose among all 410 captions: `seen` are scenes with pairs of articles that the
training had, `unseen` those with the 7 pairs, a fifth by their hash, that it had not. Here `lit`
has the right one first for 10.8 and 0.0%, `random` for 2.4 and 0.0% (docs/words.md).
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice

STARTS = ('random', 'lit')


def source(split, label=None):
    return dict(name='scene_captions:0.2', split=split, label=label)


def get_config(arg='random'):
    check_choice('argument', arg, STARTS)
    large = arg == 'lit'
    config = ConfigDict()
    config.seed = 0
    config.steps = 1500
    config.model = dict(num_classes=128) if large else dict(
        name='vit/8', width=128, depth=6, num_heads=2, mlp_dim=512, pool='gap', num_classes=None
    )
    config.objective = dict(
        name='contrastive',
        text=dict(width=128, depth=2, num_heads=2, mlp_dim=512, pool='mean', pad_id=0,
                  mask_padding=True),
    )  # fmt: skip
    size = 112 if large else 96
    config.data = dict(
        task='image_text', source=source('train'), tokenizer='runs/scene_words/tokenizer',
        image_size=size, batch_size=32, view='resize',
    )  # fmt: skip
    config.optim = dict(lr=1e-3, weight_decay=0.05, warmup=50, clip=1.0)
    if large:
        config.optim.freeze = '^image/(?!head/)'
        config.objective.keep_features = True
    config.evals = {
        split: dict(
            type='zero_shot', source=source(split, 'label'), templates=('{}',), image_size=size,
            batch_size=50, every=0 if large else 500,
        ) for split in ('seen', 'unseen')
    }  # fmt: skip
    config.report = dict(every=20)
    return config
