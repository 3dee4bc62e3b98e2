"""YOLOS on COCO (FILE:MODEL): 28.7, 36.1 and 42.0 AP.

Published in the README of hustvl/YOLOS (arXiv:2106.00666) for ti/16, s/16 and b/16. Not yet run
here.

The recipe is that of the README's commands and main.py: from DeiT (b/16: distilled, at 384 px), 300
epochs (ti/16) or 150, batches of 16 or 8, AdamW with a rate of 5e-5 or 2.5e-5 that falls to 1e-7 by
a cosine, weight decay 1e-4, gradients clipped to norm 0.1, 100 detection tokens, positions before
each block but in ti/16, and DETR's crops, of which the smaller side is 256 to 608 (ti/16) or 480 to
800 px and the larger at most 1,008 or 1,328. Evaluated at 512 or 800 px.

Where it differs: images are padded to one square of 1,008 or 1,328 px, which is one shape to
compile and 3,969 or 6,889 patches whatever the image; a device has one image there (ti/16: two),
padded to none. So a position is one in the square, and not one in the image: there the table is
interpolated to each image's grid. Positions of later blocks begin at zeros and do not decay, there
with a deviation of 0.02. Sides are not made multiples of 16 px, as the square is one. b/16 keeps
the distillation token; there the class token has its position, and it is dropped. The head has 80
classes, there 91 ids. The rate changes with each step, there once an epoch.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

SMALL, LARGE = tuple(range(256, 609, 16)), tuple(range(480, 801, 16))
MODELS = {  # row of the table, checkpoint, epochs, batch, rate, smaller sides, larger, in tests
    'ti/16': (('YOLOS-Ti', 300), 'deit/ti_16-i1k-224', 300, 16, 5e-5, SMALL, 1008, 512),
    's/16': (('YOLOS-S', 300), 'deit/s_16-i1k-224', 150, 8, 2.5e-5, LARGE, 1328, 800),
    'b/16': (('YOLOS-B', 1000), 'deit/b_16_distilled-i1k-384', 150, 8, 2.5e-5, LARGE, 1328, 800),
}  # fmt: skip
ARGS = tuple(MODELS)


def get_config(arg='s/16'):
    check_choice('argument', arg, ARGS)
    row, begin, epochs, batch, lr, sides, size, side = MODELS[arg]
    coco = dict(name='./data/coco')  # annotations, train2017 and val2017

    config = ConfigDict()
    config.seed = 0
    config.epochs = epochs

    config.model = dict(
        name=f'vit-{arg}', gelu='exact', posemb_std=0.02, interpolation='bicubic',
        posemb_at='stem' if arg == 'ti/16' else 'layers', dist_token=arg == 'b/16',
        matmul_dtype='bfloat16', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    config.init_from = begin
    config.objective = dict(name='detect')
    config.data = dict(
        task='detect', source=dict(coco, split='train'), image_size=size, batch_size=batch,
        view=dict(name='resize_or_crop', smaller=sides), tolerance=1e-4,
    )  # fmt: skip
    config.evals = dict(test=dict(
        type='detect', source=dict(coco, split='val'), image_size=size,
        view=dict(name='fit', smaller=side), every=50_000,
    ))  # fmt: skip
    config.optim = dict(
        name='adamw', lr=lr, schedule='cosine', end_lr=1e-7, weight_decay=1e-4, clip=0.1,
        decay=('kernel$', r'(class|box)_head/.*bias$'),
    )  # fmt: skip
    config.checkpoint = dict(every=10_000)
    config.report = dict(every=100)
    config.expected = [published.expected('yolos.readme', row, 'AP', 'test/ap')]
    return config
