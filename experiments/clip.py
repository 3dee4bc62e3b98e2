"""CLIP on WIT (FILE:MODEL): 63.3, 68.3, 75.5 and 76.6% of ImageNet, zero-shot.

These are OpenCLIP's for the public checkpoints of b/32, b/16, l/14 and l/14,336, with COCO's texts
by image (50.1, 52.4, 56.3 and 57.9%) and images by text (30.4, 33.1, 36.5 and 37.1%):
mlfoundations/open_clip docs/openclip_results.csv, openclip_retrieval_results.csv. Not yet run here.

The recipe is arXiv:2103.00020 section 2 and appendix F: both towers from random weights, 32 epochs
of 400 million pairs in batches of 32,768, softmax over texts and over images with a temperature of
1 / 0.07 that stays below 100, AdamW with b2 0.98 and epsilon 1e-6, a rate of 5e-4 (l/14: 4e-4),
2,000 steps of warm-up, a cosine, weight decay 0.2 of all arrays but gains and biases, windows at
random of images whose smaller side is 224 px; 77 tokens of a causal text tower of width 512 (l/14:
768), read where the text ends. Initial distributions are those of this package but for vocabulary,
positions and projections, which are openai/CLIP's (clip/model.py). Patches and the projection of
images have a bias here.
Products are of bfloat16, there of float16.

l/14,336 is an epoch more at 336 px from the run of l/14, with a rate of 2e-5 (section 2.5); that it
has no warm-up is a choice.

WIT is not public. --config.data.source.name=PATH names other images with texts, such as shards of
WebDataset. The same evaluations of a public checkpoint:

    python -m vit_jax.evaluate --config FILE:b/32 --checkpoint hf://openai/clip-vit-base-patch32
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

MODELS = {  # rate, width and heads of the text tower, which is the width of the space, too
    'b/32': (5e-4, 512, 8), 'b/16': (5e-4, 512, 8), 'l/14': (4e-4, 768, 12),
    'l/14,336': (2e-5, 768, 12),
}  # fmt: skip
METRICS = {  # of a run: columns of the table
    'imagenet/accuracy': 'ImageNet', 'coco/image_to_text@1': 'COCO I-T',
    'coco/text_to_image@1': 'COCO T-I',
}  # fmt: skip
ARGS = tuple(MODELS)


def get_config(arg='b/32'):
    check_choice('argument', arg, ARGS)
    rate, width, heads = MODELS[arg]
    model, _, larger = arg.partition(',')
    size = int(larger or 224)

    config = ConfigDict()
    config.seed = 0
    config.epochs = 1 if larger else 32

    common = dict(gelu='quick', epsilon=1e-5, matmul_dtype='bfloat16')
    config.model = dict(
        name=f'vit-{model}', pool='cls', pre_norm=True, last_norm='pooled', num_classes=width,
        interpolation='bicubic', mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711), **common,
    )  # fmt: skip
    config.objective = dict(
        name='contrastive', loss='softmax', temperature=1 / 0.07, temperature_max=100.0, text=dict(
            vocab_size=49_408, width=width, depth=12, num_heads=heads, mlp_dim=4 * width,
            causal=True, pool='eos', vocab_std=0.02, posemb_std=0.01, num_classes=width,
            head_bias=None, **common,
        ),
    )  # fmt: skip
    config.data = dict(
        task='image_text', source=dict(name='data/wit400m', label=None),
        view=dict(name='small_crop', smaller=size, flip=False, method='bicubic', antialias=True),
        tokenizer='hf://openai/clip-vit-base-patch32', length=77, image_size=size,
        batch_size=32_768,
    )  # fmt: skip
    config.optim = dict(
        name='adamw', lr=rate, b2=0.98, eps=1e-6, weight_decay=0.2,
        decay=('kernel$', 'vocabulary$', 'posemb$'), schedule='cosine',
        warmup=0 if larger else 2_000,
    )  # fmt: skip
    if larger:
        config.init_from = 'runs/clip/l_14'
    centre = dict(
        name='small_central', smaller=size, method='bicubic', antialias=True,
        rounding='torchvision',
    )  # fmt: skip
    config.evals = dict(
        imagenet=dict(
            type='zero_shot', source=dict(name='imagenet2012', split='validation'), view=centre,
            labels='imagenet', templates='openai_80', batch_size=4096, every=50_000,
        ),
        coco=dict(
            type='retrieval', source=dict(name='coco_captions', split='test', label=None),
            view=centre, captions=5, batch_size=4096, every=50_000,
        ),
    )  # fmt: skip
    config.checkpoint = dict(every=5_000)
    config.report = dict(every=100)
    row = (f'ViT-{arg.upper().replace("/", "-").replace(",", "-")}', 'openai')
    config.expected = [
        published.expected('openclip.results', row, column, metric)
        for metric, column in METRICS.items()
    ]  # fmt: skip
    return config
