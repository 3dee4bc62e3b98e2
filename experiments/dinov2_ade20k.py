"""Linear segmentation of ADE20K on DINOv2's frozen features (FILE:MODEL): 44.3 to 49.0% mIoU.

Published in arXiv:2304.07193 table 10: 44.3, 47.3, 47.7 and 49.0% for s/14, b/14, l/14 and g/14
(column lin.), and 47.2, 51.3, 53.1 and 53.0% for s/14,ms ... g/14,ms (column +ms). Not yet run
here.

The recipe is that of section 7.4 with the settings of the config that is released with each head
(dinov2_vits14_ade20k_linear_config.py; read in BrianPulfer/robustness-tokens configs/eval, which
changes paths and sizes): batch norm and a linear layer on the patches after the last norm, 40,000
steps of 16 crops of 512 px, AdamW with a rate of 0.001, linear decay after 1,500 steps of warm-up,
weight decay 1e-4 of all that is trained, crops of images scaled by 0.5 to 2, flips and photometric
distortion. Windows slide by 341 px over images whose smaller side is that of the crops.
FILE:MODEL,ms reads the last four blocks, has crops of 640 px of images scaled by 1 to 3, and
windows that slide by 320 px over five scales and mirrored images; these are settings of the ms
config as others have copied them.

Where it differs: crops and windows have 518 or 644 px, whole patches, where the code pads 512 or
640 px to these and resizes their logits to 512 or 640. Padding is black, not the mean colour. The
loss is the mean of the pixels that have a class, there of all. The rate falls after the warm-up,
there during it, too. An image's larger side is at most four times its smaller one. Evaluation
resizes images with antialiasing, training without, OpenCV always without.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

GIANT = dict(name='vit/14', width=1536, depth=40, num_heads=24, mlp_dim=4096, glu=True)
MODELS = {f'{size}/14': dict(name=f'vit-{size}/14') for size in 'sbl'} | {'g/14': GIANT}
ARGS = (*MODELS, *(f'{model},ms' for model in MODELS))
SCALES = (1.0, 1.32, 1.73, 2.28, 3.0)


def get_config(arg='s/14'):
    check_choice('argument', arg, ARGS)
    model, _, several = arg.partition(',')
    size, scale = (644, (1.0, 3.0)) if several else (518, (0.5, 2.0))
    ade20k = dict(name='./data/ADEChallengeData2016')  # as its archive has it

    config = ConfigDict()
    config.seed = 0
    config.steps = 40_000

    config.model = dict(
        gelu='exact', layer_scale=1.0, interpolation='bicubic', matmul_dtype='bfloat16',
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **MODELS[model],
    )  # fmt: skip
    config.init_from = f'dinov2/{model.replace("/", "_")}-lvd142m'
    config.objective = dict(name='segment', blocks=4 if several else 1)
    config.data = dict(
        task='segment', source=dict(ade20k, split='train'), zero='ignored', classes=150,
        view=dict(name='scale_crop', scale=scale, antialias=False), augment=('photometric',),
        image_size=size, batch_size=16,
    )  # fmt: skip
    windows = dict(stride=341)
    if several:  # up to 283 windows an image
        windows = dict(stride=320, scales=SCALES, flip=True, batch_size=4)
    config.evals = dict(test=dict(
        type='segment', source=dict(ade20k, split='validation'), zero='ignored', image_size=size,
        canvas=2100, every=10_000, **windows,
    ))  # fmt: skip
    config.optim = dict(
        name='adamw', lr=1e-3, weight_decay=1e-4, decay=('.',), schedule='linear', warmup=1_500,
        only=('^(batch_norm|head)/',),
    )  # fmt: skip
    config.checkpoint = dict(every=10_000)
    config.report = dict(every=50)
    row = ('DINOv2', f'ViT-{model if model == "g/14" else model.upper()}')
    column = 'ADE20K +ms' if several else 'ADE20K lin.'
    config.expected = [published.expected('dinov2.table10', row, column, 'test/miou')]
    return config
