"""Linear segmentation of ADE20K on DINOv2's frozen features (FILE:MODEL): 44.3 to 49.0% mIoU.

Published in arXiv:2304.07193 table 10, column lin.: 44.3, 47.3, 47.7 and 49.0% for s/14, b/14, l/14
and g/14. Not yet run here.

The recipe is that of section 7.4 with the settings of the config that is released with each head
(dinov2_vits14_ade20k_linear_config.py; read in BrianPulfer/robustness-tokens configs/eval, which
changes paths and sizes): batch norm and a linear layer on the patches after the last norm, 40,000
steps of 16 crops of 512 px, AdamW with a rate of 0.001, linear decay after 1,500 steps of warm-up,
weight decay 1e-4 of all that is trained, crops of images scaled by 0.5 to 2, flips and photometric
distortion. Windows slide by 341 px over images whose smaller side is that of the crops.

Where it differs: crops and windows have 518 px, 37 patches, where the code pads 512 px to 518 and
resizes logits of these to 512. Padding is black, not the mean colour. The loss is the mean of the
pixels that have a class, there of all. The rate falls after the warm-up, there during it, too. An
image's larger side is at most four times its smaller one. Evaluation resizes images with
antialiasing, training without, OpenCV always without.

Column +ms concatenates four blocks and is not here.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

GIANT = dict(name='vit/14', width=1536, depth=40, num_heads=24, mlp_dim=4096, glu=True)
MODELS = {f'{size}/14': dict(name=f'vit-{size}/14') for size in 'sbl'} | {'g/14': GIANT}
ARGS = tuple(MODELS)


def get_config(arg='s/14'):
    check_choice('argument', arg, ARGS)
    ade20k = dict(name='./data/ADEChallengeData2016')  # as its archive has it

    config = ConfigDict()
    config.seed = 0
    config.steps = 40_000

    config.model = dict(
        gelu='exact', layer_scale=1.0, interpolation='bicubic', matmul_dtype='bfloat16',
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **MODELS[arg],
    )  # fmt: skip
    config.init_from = f'dinov2/{arg.replace("/", "_")}-lvd142m'
    config.objective = dict(name='segment')
    config.data = dict(
        task='segment', source=dict(ade20k, split='train'), zero='ignored', classes=150,
        view=dict(name='scale_crop', antialias=False), augment=('photometric',), image_size=518,
        batch_size=16,
    )  # fmt: skip
    config.evals = dict(test=dict(
        type='segment', source=dict(ade20k, split='validation'), zero='ignored', image_size=518,
        stride=341, canvas=2100, every=10_000,
    ))  # fmt: skip
    config.optim = dict(
        name='adamw', lr=1e-3, weight_decay=1e-4, decay=('.',), schedule='linear', warmup=1_500,
        only=('^(batch_norm|head)/',),
    )  # fmt: skip
    config.checkpoint = dict(every=10_000)
    config.report = dict(every=50)
    row = ('DINOv2', f'ViT-{arg if arg == "g/14" else arg.upper()}')
    config.expected = [published.expected('dinov2.table10', row, 'ADE20K lin.', 'test/miou')]
    return config
