"""LiT: texts for a locked image tower (FILE:MODEL): 73.9 and 75.7% of ImageNet, zero-shot.

Published for b/16 and l/16 (google-research/vision_transformer model_cards/lit.md, its models
LiT-B16B_2 and LiT-L16L; arXiv:2111.07991 table 1 has 75.7% for the latter). Not yet run here.

The recipe is appendices D and I: the image tower is AugReg's of ImageNet-21k and stays as it is,
the text tower is as large and its class token has a projection; 16 tokens of BERT's WordPiece;
softmax over batches of 16,384, Adam (l/16: Adafactor) with a rate of 1e-3 and weight decay of 1e-4
a step, which is 0.1 times the rate (big_vision optax.py), 2,000 steps of warm-up, a cosine,
gradients clipped to norm 1, windows of Inception. They are trained on YFCC100M's 15 million images
of CLIP's subset and the 10 million of CC12M that were left, for 60,000 steps (big_vision
README_lit.md for b/16; for l/16 it is a choice). Evaluations resize images, whatever their aspect
ratio.

    b/32,cc12m           on CC12M alone, 12,000 steps: 60.7% (table 6)
    b/16,large,cc12m     with a large text tower, Adafactor: 66.9% (appendix B)
    l/16,large,cc12m     67.6% (appendix B)
    b/16,unlocked        the image tower is trained with a tenth of the rate (appendix H, which has
                         its numbers in a figure) and without decay (arXiv:2303.15343 section 4.5)
    b/32,scratch         both from random weights on the authors' 4 billion pairs, 55,000 steps with
                         Adafactor and 10,000 of warm-up, no decay: 50.6% (table 2)

Where it differs: the text towers there are BERT, from its weights. BERT has a norm after each
residual sum and one of its embeddings, which models/text.py has not (its order 'post' is a norm
before the sum): here they are pre-norm, of the same size and from random weights. By figure 3 that
costs little. Of a YFCC image, which has title, description and tags there with a loss each, one
text is drawn. The logits' temperature begins at 10 (big_vision siglip_lit_coco.py). Products are
of bfloat16.

CC12M is a list of addresses, of which some have no image any more; YFCC100M has to be asked for.
Both belong into folders as data/cc12m, of any layout with captions; --config.data.source sets
others. --config.init_from=PATH takes any other image tower.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

TEXT = {  # sizes of BERT (arXiv:1810.04805 section 3)
    'base': dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
    'large': dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
}  # fmt: skip
METRICS = {  # of a run: names in tables of the model card, and in others
    'imagenet/accuracy': ('ImageNet zero-shot', 'ImageNet'),
    'coco/image_to_text@1': ('MS-COCO Captions image-to-text retrieval', 'COCO I-T'),
    'coco/text_to_image@1': ('MS-COCO Captions text-to-image retrieval', 'COCO T-I'),
}  # fmt: skip
CELLS = {  # table, row, metrics
    'b/32,cc12m': ('lit.table6', 'ViT-B/32', 3),
    'b/16,large,cc12m': ('lit.text', 'B/16 and large text tower, CC12M', 1),
    'l/16,large,cc12m': ('lit.text', 'L/16 and large text tower, CC12M', 1),
    'b/32,scratch': ('lit.table2', 'uu', 1), 'b/16,unlocked': ('', '', 0),
}  # fmt: skip
ARGS = ('b/16', 'l/16', *CELLS)


def get_config(arg='b/16'):
    check_choice('argument', arg, ARGS)
    model, *words = arg.split(',')
    text = 'large' if 'large' in words or arg == 'l/16' else 'base'
    scratch = 'scratch' in words

    config = ConfigDict()
    config.seed = 0
    config.steps = 12_000 if 'cc12m' in words else 55_000 if scratch else 60_000

    config.model = dict(name=f'vit-{model}', matmul_dtype='bfloat16')
    config.objective = dict(
        name='contrastive', loss='softmax', temperature=10.0, text=dict(
            vocab_size=30_522, pool='first', mask_padding=True, pad_id=0, epsilon=1e-12,
            matmul_dtype='bfloat16', **TEXT[text],
        ),
    )  # fmt: skip
    config.data = dict(
        task='image_text', source=source(words), view=dict(name='inception', antialias=False),
        tokenizer='gs://vit_models/lit/bert/uncased_L-12_H-768_A-12/vocab.txt', length=16,
        image_size=224, batch_size=16_384,
    )  # fmt: skip
    config.optim = dict(
        name='adafactor' if text == 'large' or scratch else 'adamw', lr=1e-3, clip=1.0,
        weight_decay=0.1, momentum_dtype='bfloat16' if text == 'large' or scratch else None,
        schedule='cosine', warmup=2_000,
    )  # fmt: skip
    squeezed = dict(name='resize', antialias=False)
    if scratch:
        config.data.update(view=squeezed)
        config.optim.update(weight_decay=0.0, warmup=10_000, clip=None)
    else:
        config.init_from = f'augreg/{model.replace("/", "_")}-i21k'
    if 'unlocked' in words:
        config.optim.update(rate_factors=(('^image/', 0.1),), decay_factors=(('^image/', 0.0),))
    elif not scratch:
        config.optim.freeze = '^image/'
    config.evals = dict(
        imagenet=dict(
            type='zero_shot', source=dict(name='imagenet2012', split='validation'), view=squeezed,
            labels='imagenet', templates='openai_80', canonical=True, batch_size=4096, every=5_000,
        ),
        coco=dict(
            type='retrieval', source=dict(name='coco_captions', split='test', label=None),
            view=squeezed, captions=8, batch_size=4096, every=5_000,
        ),
    )  # fmt: skip
    config.checkpoint = dict(every=2_500)
    config.report = dict(every=100)
    config.expected = expected(arg)
    return config


def source(words):
    """The data set of a run: CC12M, the authors' own, or CC12M and the subset of YFCC100M."""
    if 'cc12m' in words or 'scratch' in words:
        return dict(name='data/cc12m' if 'cc12m' in words else 'data/lit4b', label=None)
    return dict(mixture=dict(
        yfcc=dict(name='data/yfcc15m', label=None, weight=15.0),
        cc12m=dict(name='data/cc12m', label=None, weight=10.0),
    ))  # fmt: skip


def expected(arg):
    """Lines of `expected`: the published numbers of a run."""
    if arg not in CELLS:
        column = 'B16B_2' if arg == 'b/16' else 'L16L'
        return [
            published.expected('vt.lit', row, column, metric)
            for metric, (row, _) in METRICS.items()
        ]  # fmt: skip
    table, row, count = CELLS[arg]
    return [
        published.expected(table, row, column, metric)
        for metric, (_, column) in list(METRICS.items())[:count]
    ]  # fmt: skip
