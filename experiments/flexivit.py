"""FlexiViT on ImageNet-21k (FILE:i21k) and ImageNet-1k (FILE:s, FILE:b, FILE:l): any patch size.

One model for patches of 8 to 48 pixels, arXiv:2212.08013, whose appendix has the accuracies by
patch size; none is repeated here. Not yet run here.

FILE:i21k is supervised (big_vision configs/proj/flexivit/i21k_sup.py): B with a kernel of 8 x 8 and
7 x 7 positions, at 240 px, 90 epochs with batches of 4,096. FILE:s, FILE:b and FILE:l learn from
DeiT III of the same size at 384 px, from whose weights they start (i1k_deit3_distill.py): 90
epochs, mixup, no labels; --config.epochs=300, 600 and 1200 are the paper's longer runs. The teacher
sees the student's crop enlarged from 240 px, there it sees the same window of the image at 384 px.
Each step has one of ten sides at random. Evaluations have patches of 16 pixels;
python -m vit_jax.evaluate --checkpoint RUN --patch_size=30 has others.
"""

from ml_collections import ConfigDict

from vit_jax.data import distort
from vit_jax.errors import check_choice

SIDES = (48, 40, 30, 24, 20, 16, 15, 12, 10, 8)  # of 240 pixels
TEACHERS = {'s': 'small', 'b': 'base', 'l': 'large'}
ARGS = ('i21k', *TEACHERS)


def get_config(arg='i21k'):
    check_choice('argument', arg, ARGS)
    large = arg == 'i21k'

    config = ConfigDict()
    config.seed = 0
    config.epochs = 90

    flexible = dict(patch_sides=SIDES, patch_grid=7, predict_side=16)
    if large:
        augment, mixup = (distort.AUGREG['light2'][key] for key in ('augment', 'mixup'))
        config.model = dict(
            name='vit-b/8', interpolation='bilinear_antialias', cls_posemb=False,
            head_bias=-10.0, dtype='bfloat16',
        )  # fmt: skip
        config.objective = dict(loss='sigmoid', mixup=mixup, **flexible)
        splits = 'full[51200:]', 'full[25600:51200]'
    else:
        teacher = f'timm/deit3_{TEACHERS[arg]}_patch16_384.fb_in1k'
        augment, splits = (), ('train[:99%]', 'train[99%:]')
        config.init_from = teacher
        config.model = dict(
            name=f'vit-{arg}/16', interpolation='bilinear_antialias', matmul_dtype='bfloat16'
        )
        config.objective = dict(
            name='distill', teacher=teacher, kind='soft', alpha=1.0, mixup=1.0, **flexible
        )
    name = 'imagenet21k' if large else 'imagenet2012'
    config.data = dict(
        source=dict(name=name, split=splits[0]), view=dict(name='inception', antialias=False),
        image_size=240, augment=augment, batch_size=4096 if large else 1024,
    )  # fmt: skip
    view = dict(name='small_central', smaller=272)  # 240 // 7 * 8
    config.evals = dict(val=dict(source=dict(name=name, split=splits[1]), view=view, every=5_000))
    if not large:
        test = dict(name=name, split='validation')
        config.evals.test = dict(source=test, view=view, every=5_000)
    config.optim = dict(
        name='adamw', clip=1.0, momentum_dtype='bfloat16', lr=1e-3 if large else 1e-4,
        weight_decay=0.1, warmup=10_000 if large else 5_000,
    )  # fmt: skip
    config.checkpoint = dict(every=1_000)
    config.report = dict(every=50)
    return config
