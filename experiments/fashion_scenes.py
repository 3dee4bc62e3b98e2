"""Masks and boxes of 5,000 drawn scenes (FILE:HEAD,START): 51.4% mIoU, all of DINOv2 trained.

    python -m vit_jax.main --config FILE:mae --workdir runs/fashion_scenes/mae
    python -m vit_jax.main --config FILE:linear,frozen --config.init_from=PATH --workdir DIR

HEAD is linear (a class for each patch), eomt (a set of masks) or yolos (a set of boxes). START:

    random  a ViT of width 128 and 6 blocks, of random weights, at 96 px
    mae     the same, from FILE:mae, which sees the scenes without labels
    frozen  the ViT-S/14 of --config.init_from, of which the head alone learns, at 168 px
    dinov2  the same, all of its weights

Both have 12 x 12 patches; with yolos the ViT-S/14 has 6 x 6, at 84 px. Measured here on 1,000 test
scenes, one run each with seed 0 on two CPU cores beside other work; the weights are those of
experiments/fashion_2k.py. In percent mIoU and pixels, or average precision of boxes and masks:

                  scenes   mIoU  pixels  AP    masks  minutes
    linear,random 24,000   12.6   81.1                11
    linear,mae    24,000   16.4   82.1                11, and 22 for FILE:mae
    linear,frozen  9,600   30.7   85.8                18
    linear,dinov2  4,800   51.4   90.9                10
    eomt,random   24,000   17.5   81.8    6.5   7.1   19
    eomt,mae      24,000   17.5   82.2    7.1   7.9   18 of one core, and 18 for FILE:mae
    eomt,frozen    9,600   13.8   81.1    2.3   2.1   35
    eomt,dinov2    4,800   19.8   83.1    9.8   9.2   37
    yolos,random  24,000                  0.03        22, with 20 queries
    yolos,mae     24,000                  0.01         8 of one core
    yolos,frozen  41,600                  0.75        26 of one core
    yolos,dinov2  36,800                 20.4         39 of one core

Background alone has 7.2% mIoU and 79.6% of the pixels; of each class a box in its mean place, by
the class's frequency, has 0.02% AP. yolos learns no more where the encoder is small, nor
with a tenth of the heads' rate for DINOv2 (benchmarks/RESULTS.md, "YOLOS on drawn scenes").
EoMT's queries join the last two blocks, which are frozen in eomt,frozen. Its panoptic quality is
that of the background, 8.6 to 8.8%, as no score of an article is high.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice

HEADS, STARTS = ('linear', 'eomt', 'yolos'), ('random', 'mae', 'frozen', 'dinov2')
ARGS = ('mae', *(f'{head},{start}' for head in HEADS for start in STARTS))
SMALL = dict(
    name='vit/8', width=128, depth=6, num_heads=2, mlp_dim=512, posemb='learn', cls_token=True,
    unroll=6,
)  # fmt: skip
STEPS = {  # of 16 scenes
    'linear': {'random': 1500, 'mae': 1500, 'frozen': 600, 'dinov2': 300},
    'eomt': {'random': 1500, 'mae': 1500, 'frozen': 600, 'dinov2': 300},
    'yolos': {'random': 1500, 'mae': 1500, 'frozen': 2600, 'dinov2': 2300},
}
SIZES = {'linear': 168, 'eomt': 168, 'yolos': 84}  # of the images of a ViT-S/14
OBJECTIVES = {
    'linear': dict(name='segment'),
    'eomt': dict(name='masks', queries=20, query_blocks=2, points=256),
    'yolos': dict(name='detect', queries=10),
}
TRAINED = {  # parameters beside the encoder
    'linear': ('^(head|batch_norm)/',),
    'eomt': ('^(class_head|mask_head|upscale_|query)',),
    'yolos': ('^(?!vit/)',),
}


BOXES = dict(boxes='objects/bbox', labels='objects/label', crowd=None, box_format='yxyx')
SEGMENTS = dict(
    segments='instances', labels='objects/label', crowd=None, ids=None, zero='background'
)
TASKS = {  # what a scene is, and how it is measured
    'linear': (
        dict(task='segment', zero='background'),
        dict(test=dict(type='segment', canvas=96, zero='background')),
    ),
    'eomt': (
        dict(task='panoptic', most=6, **SEGMENTS),
        dict(
            test=dict(type='panoptic', canvas=96, most_segments=6, **SEGMENTS),
            maps=dict(type='segment', canvas=96, zero='background'),
            objects=dict(type='detect', canvas=96, masks=True, segmentation='instances', **BOXES),
        ),
    ),
    'yolos': (dict(task='detect', most=5, **BOXES), dict(test=dict(type='detect', **BOXES))),
}


def source(split):
    return dict(name='fashion_scenes', split=split, label='objects/label')


def get_config(arg='linear,random'):
    check_choice('argument', arg, ARGS)
    head, _, start = arg.partition(',')
    config = ConfigDict()
    config.seed = 0
    config.report = dict(every=20)
    config.checkpoint = dict(every=500)
    if arg == 'mae':
        config.steps = 2000
        config.model = SMALL
        config.objective = dict(
            name='mae', decoder_width=64, decoder_depth=2, decoder_heads=2, decoder_mlp_dim=256
        )
        config.data = dict(
            task='image', source=source('train'), image_size=96, batch_size=64,
            view=dict(name='inception_torchvision', area=(0.2, 1.0), method='bicubic'),
        )  # fmt: skip
        config.optim = dict(lr=1e-3, b2=0.95, weight_decay=0.05, warmup=200)
        config.evals = {}
        return config

    task, evals = TASKS[head]
    large = start in ('frozen', 'dinov2')
    size = SIZES[head] if large else 96
    config.steps = STEPS[head][start]
    config.model = {} if large else SMALL
    if start == 'mae':
        config.init_from = 'runs/fashion_scenes/mae'
    config.objective = OBJECTIVES[head]
    config.data = dict(
        source=source('train'), image_size=size, batch_size=16,
        view=dict(name='scale_crop', scale=(0.8, 1.25), largest_class=1.0),
        **task,
    )  # fmt: skip
    config.optim = dict(lr=1e-3, weight_decay=0.05, warmup=100, clip=1.0)
    if start == 'frozen':
        config.optim.update(only=TRAINED[head], warmup=50)
    elif start == 'dinov2' and head == 'yolos':
        config.optim.update(rate_factors=(('^vit/', 0.02),), warmup=50)
    elif start == 'dinov2':
        config.optim.update(lr=2e-4, layer_decay=0.75, warmup=50)
    same = dict(source=source('test'), image_size=size, batch_size=50)
    config.evals = {name: same | settings for name, settings in evals.items()}
    return config
