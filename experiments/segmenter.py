"""Segmenter on ADE20K (FILE:MODEL,DECODER): 38.1 to 51.8% mIoU, 38.8 to 53.6% at several scales.

Published in the README of rstrudel/segmenter (arXiv:2105.05633), at one scale and at several:
38.1 and 38.8% for ti/16,mask, 45.3 and 46.9% for s/16,mask, 48.5 and 50.0% for b/16,mask, 51.8 and
53.6% for l/16,mask at 640 px; from DeiT, 47.1 and 48.1% for deit-b/16,linear, 48.7 and 50.1% for
deit-b/16,mask. Not yet run here.

The recipe is that of the authors' code: from AugReg's models of ImageNet-21k, fine-tuned on
ImageNet at 384 px, or the distilled DeiT of 384 px; 64 epochs of 8 crops, SGD with Nesterov's
momentum, a rate of 0.001 that falls to 1e-5 with power 0.9, no weight decay, stochastic depth 0.1
in the encoder and dropout 0.1 in the decoder of two blocks, crops of images scaled by 0.5 to 2,
flips and photometric distortion. Windows overlap by 32 px. Several scales are 0.5 to 1.75, with
mirrored images; scales below 1, which the code enlarges again to the size of a window, are 1 here,
and those of l/16 are of 512 px there as here.

Where it differs: padding is black, not the mean colour. Evaluation resizes images with
antialiasing, OpenCV without, as training here. Products are of bfloat16.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

MODELS = {  # row of the table, checkpoint, size of crops
    'ti/16,mask': ('Seg-T-Mask/16', 'augreg/ti_16-i1k-384', 512),
    's/16,mask': ('Seg-S-Mask/16', 'augreg/s_16-i1k-384', 512),
    'b/16,mask': ('Seg-B-Mask/16', 'augreg/b_16-i1k-lr_0.01-384', 512),
    'l/16,mask': ('Seg-L-Mask/16', 'augreg/l_16-i1k-medium1-384', 640),
    'deit-b/16,linear': ('Seg-B†/16', 'deit/b_16_distilled-i1k-384', 512),
    'deit-b/16,mask': ('Seg-B†-Mask/16', 'deit/b_16_distilled-i1k-384', 512),
}  # fmt: skip
ARGS = tuple(MODELS)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of 512 px


def get_config(arg='b/16,mask'):
    check_choice('argument', arg, ARGS)
    row, begin, size = MODELS[arg]
    name, _, decoder = arg.rpartition(',')
    distilled = name.startswith('deit-')
    ade20k = dict(name='./data/ADEChallengeData2016')  # as its archive has it

    config = ConfigDict()
    config.seed = 0
    config.epochs = 64

    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if distilled else ((0.5,) * 3,) * 2
    config.model = dict(
        name=f'vit-{name.removeprefix("deit-")}', gelu='exact', epsilon=1e-5, drop_path=0.1,
        interpolation='bilinear', matmul_dtype='bfloat16', dist_token=distilled, mean=mean, std=std,
    )  # fmt: skip
    config.init_from = begin
    head = dict(batch_norm=False) if decoder == 'linear' else dict(head='segmenter')
    config.objective = dict(name='segment', **head)
    config.data = dict(
        task='segment', source=dict(ade20k, split='train'), zero='ignored', classes=150,
        view=dict(name='scale_crop', antialias=False), augment=('photometric',), image_size=size,
        batch_size=8,
    )  # fmt: skip
    test = dict(
        type='segment', source=dict(ade20k, split='validation'), zero='ignored', image_size=size,
        stride=size - 32, canvas=2100,
    )  # fmt: skip
    scales = tuple(max(512 * scale / size, 1.0) for scale in SCALES)
    config.evals = dict(
        test=dict(test, every=10_000), scales=dict(test, scales=scales, flip=True, every=160_000)
    )
    config.optim = dict(
        name='sgd', nesterov=True, lr=1e-3, schedule='poly', power=0.9, end_lr=1e-5
    )
    config.checkpoint = dict(every=10_000)
    config.report = dict(every=100)
    config.expected = [
        published.expected('segmenter.readme', row, column, f'{metric}/miou')
        for column, metric in (('one scale', 'test'), ('several scales', 'scales'))
    ]
    return config
