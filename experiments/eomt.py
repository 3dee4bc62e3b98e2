"""EoMT on ADE20K and COCO (FILE:DATA,MODEL): 58.4% mIoU, 46.7 to 59.2 PQ, 45.2 and 48.8 AP.

Published in tue-mps/eomt model_zoo/dinov2.md (arXiv:2503.19108), from DINOv2 with registers: 58.4%
mIoU for ade20k,l/16; panoptic quality of 46.7, 51.6, 56.0 and 57.0% for coco,s/16, coco,b/16,
coco,l/16 and coco,g/16 at 640 px, 58.3 and 59.2% for coco,l/16,1280 and coco,g/16,1280; average
precision of masks of 45.2 and 48.8% for instances,l/16 and instances,l/16,1280. Not yet run here.

The recipe is that of the authors' configs and training/: patches of 16 px, 100 or 200 queries in
the last 3 (s/16, b/16), 4 or 5 (g/16) blocks, 31 epochs (ADE20K), 12 or 24 (s/16, b/16) of batches
of 16, AdamW with a rate of 1e-4 that falls with power 0.9, weight decay 0.05 of all parameters,
layer-wise decay 0.8 from the last block, gradients clipped to norm 0.01, 500 steps of warm-up of
the queries and heads, the encoder from there on in 1,000 steps, masked attention that ends in one
block after the other, and large-scale jittering. ADE20K is evaluated in windows, COCO in one view.

Where it differs: the encoder's rate falls from step 500 on, there from 1,500; its moments begin
there, too. One random number places the window along both axes, there two. Photometric distortion
is mmsegmentation's, which adds brightness and has contrast about black. An image whose window shows
no segment stays in the batch, there it is drawn again. Products are of bfloat16, there of float16.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

SIZES = {  # fields of the model, blocks of the queries, epochs on COCO
    's/16': (dict(name='vit-s/16'), 3, 24), 'b/16': (dict(name='vit-b/16'), 3, 24),
    'l/16': (dict(name='vit-l/16'), 4, 12),
    'g/16': (
        dict(name='vit/16', width=1536, depth=40, num_heads=24, mlp_dim=4096, glu=True), 5, 12
    ),
}  # fmt: skip
TIMM = {'s/16': 'small', 'b/16': 'base', 'l/16': 'large', 'g/16': 'giant'}
ARGS = (
    'ade20k,l/16', *(f'coco,{model}' for model in SIZES), 'coco,l/16,1280', 'coco,g/16,1280',
    'instances,l/16', 'instances,l/16,1280',
)  # fmt: skip


def get_config(arg='coco,l/16'):
    check_choice('argument', arg, ARGS)
    data, model, *words = arg.split(',')
    size = 1280 if words else 512 if data == 'ade20k' else 640
    fields, blocks, epochs = SIZES[model]

    config = ConfigDict()
    config.seed = 0
    config.epochs = 31 if data == 'ade20k' else epochs

    config.model = dict(
        gelu='exact', layer_scale=1.0, registers=4, cls_posemb=False,
        interpolation='bicubic_antialias', matmul_dtype='bfloat16', mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225), **fields,
    )  # fmt: skip
    config.init_from = f'timm/vit_{TIMM[model]}_patch14_reg4_dinov2.lvd142m'
    config.objective = dict(
        name='masks', queries=100 if data == 'ade20k' else 200, query_blocks=blocks
    )
    config.data, test = {'ade20k': ade20k, 'coco': panoptic, 'instances': instances}[data](size)
    config.data.update(image_size=size, batch_size=16)
    config.evals = dict(test=dict(test, image_size=size, every=10_000))
    config.optim = dict(
        name='adamw', lr=1e-4, weight_decay=0.05, decay=('.',), clip=0.01, layer_decay=0.8,
        layer_decay_from='block', schedule='poly', power=0.9, warmup=500, hold=('^vit/',),
        hold_steps=500, hold_warmup=1_000,
    )  # fmt: skip
    config.checkpoint = dict(every=5_000)
    config.report = dict(every=50)
    metric = {'ade20k': 'miou', 'coco': 'pq', 'instances': 'mask_ap'}[data]
    task = {'ade20k': 'ADE20K semantic', 'coco': 'COCO panoptic', 'instances': 'COCO instance'}
    row = (f'EoMT-{model[0] if model[0] == "g" else model[0].upper()}', size)
    config.expected = [published.expected('eomt.zoo', row, task[data], f'test/{metric}')]
    return config


def ade20k(size):
    """Sections of training and of evaluation for ADE20K."""
    source = dict(name='./data/ADEChallengeData2016')  # as its archive has it
    view = dict(name='large_scale_jitter', scale=(0.5, 2.0))
    train = dict(
        task='segment', source=dict(source, split='train'), zero='ignored', classes=150, view=view,
        augment=(dict(name='photometric', hue=0.05),),
    )  # fmt: skip
    return train, dict(
        type='segment', source=dict(source, split='validation'), zero='ignored', stride=size,
        even=True, canvas=2100,
    )  # fmt: skip


def panoptic(size):
    """Those for the segments of COCO, things and stuff."""
    source = dict(name='./data/coco')  # annotations, train2017 and val2017
    train = dict(
        task='panoptic', source=dict(source, split='panoptic_train'), view='large_scale_jitter'
    )
    return train, dict(type='panoptic', source=dict(source, split='panoptic_val'), canvas=640)


def instances(size):
    """Those for the objects of COCO and their masks."""
    source = dict(name='./data/coco')
    train = dict(
        task='detect', source=dict(source, split='train'), view='large_scale_jitter', masks=True,
        tolerance=1e-4,
    )  # fmt: skip
    return train, dict(type='detect', source=dict(source, split='val'), masks=True, canvas=640)
