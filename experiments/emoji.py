"""Emoji of one house and their names, searched in the art of another (FILE:START).

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python -m vit_jax.data.tokenizers --captions emoji --split google_seen --vocab_size 1500 \\
      --length 16 --out runs/emoji/tokenizer
    python -m vit_jax.main --config FILE:lit --config.init_from=PATH --workdir runs/emoji/lit

The packages belong into TFDS's folder for manual downloads, ~/tensorflow_datasets/downloads/manual.
START:

    lit     the image tower is the ViT-S/14 of --config.init_from and stays as it is
            (arXiv:2111.07991), so each image of the training passes it once
    tuned   the same tower, with a tenth of the rate and without weight decay
    random  a ViT of width 128 and 6 blocks, of random weights

1,516 emoji of Google are trained on. Evaluations search Twitter's: `seen` the same emoji, `unseen`
the 395 others, whose names no run has read. Here `lit` was run: of Twitter's emoji
24.5% of the seen have their own name first, and 4.6% of the unseen (docs/words.md). The others are
not yet run.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice

STARTS = ('lit', 'tuned', 'random')
SMALL = dict(
    name='vit/8', width=128, depth=6, num_heads=2, mlp_dim=512, posemb='learn', pool='gap',
    num_classes=384,
)  # fmt: skip


def get_config(arg='lit'):
    check_choice('argument', arg, STARTS)
    config = ConfigDict()
    config.seed = 0
    config.steps = 600 if arg == 'lit' else 1200
    config.model = SMALL if arg == 'random' else {}
    config.objective = dict(
        name='contrastive', loss='softmax', temperature=1 / 0.07, temperature_max=100.0,
        text=dict(width=192, depth=4, num_heads=3, mlp_dim=768, pool='mean', mask_padding=True,
                  pad_id=0),
    )  # fmt: skip
    size = 64 if arg == 'random' else 112
    config.data = dict(
        task='image_text', source=dict(name='emoji', split='google_seen', label=None),
        tokenizer='runs/emoji/tokenizer', image_size=size, batch_size=256,
        view='resize' if arg == 'lit' else dict(name='inception', area=(0.5, 1.0)),
    )  # fmt: skip
    config.optim = dict(lr=1e-3, weight_decay=0.05, warmup=100, clip=1.0)
    if arg == 'lit':
        config.optim.freeze = '^image/'
        config.objective.keep_features = True
    if arg == 'tuned':
        config.optim.update(rate_factors=(('^image/', 0.1),), decay_factors=(('^image/', 0.0),))
    config.evals = {
        name: dict(
            type='retrieval', source=dict(name='emoji', split=f'twitter_{name}', label=None),
            image_size=size, batch_size=128, captions=1, every=0 if arg == 'lit' else 300,
        ) for name in ('seen', 'unseen')
    }  # fmt: skip
    config.report = dict(every=20)
    return config
