"""DeiT on ImageNet-1k, 300 epochs (FILE:MODEL): 72.2, 79.8 and 81.8%; distilled 74.5, 81.2, 83.4%.

Published for ti/16, s/16 and b/16 in arXiv:2012.12877 table 3. Here: not yet run.

FILE:MODEL has no teacher, FILE:MODEL,hard has one for the class token (74.3, 80.9 and 83.0%), and
FILE:MODEL,tokens has a distillation token with a head of its own, which learns from the teacher
alone. FILE:b/16,384, FILE:b/16,hard,384 and FILE:b/16,tokens,384 go on from these at 384 px (83.1,
84.0 and 84.5%).

The recipe is table 9 and facebookresearch/deit main.py: batches of 1,024, AdamW with a rate of
0.0005 per 512 images, weight decay 0.05, 5 epochs of warm-up, cosine decay to 1e-5, labels smoothed
by 0.1, stochastic depth 0.1, mixup 0.8 or CutMix 1.0, RandAugment 9/0.5 (timm's, which replaces
colour jitter), random erasing 0.25 and three views of an image in succession. At 384 px it is that
of README_deit.md: 30 epochs, batches of 512, a constant rate of 5e-6 after 5 epochs of warm-up,
weight decay 1e-8. With a teacher, which then sees 384 px too, it is the same here; theirs is not
published.

Where it differs: the teacher, which is a RegNetY-16GF of 82.9% trained on ImageNet-1k there, is a
BiT-M R152x2 of 82.9% at 224 px, which has seen ImageNet-21k (the teacher of arXiv:2106.05237);
--config.objective.teacher=PATH takes another. The rate begins at 0 and changes with each step, and
mixing weights are one a batch, not one a device. The code also has a moving average of weights of
0.99996 (--config.optim.ema=0.99996), which its evaluations do not read.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

IMAGES = 1_281_167  # in ImageNet's train
MODELS = {'ti/16': 'Ti', 's/16': 'S', 'b/16': 'B'}
ROWS = {'': 'no distillation', 'hard': 'hard distillation', 'tokens': 'both tokens'}
TEACHER = 'timm/resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k'
ARGS = (
    *(f'{model},{row}'.rstrip(',') for row in ROWS for model in MODELS),
    'b/16,384', 'b/16,hard,384', 'b/16,tokens,384',
)  # fmt: skip


def get_config(arg='s/16'):
    check_choice('argument', arg, ARGS)
    begin = arg.removesuffix(',384')
    larger = begin != arg  # goes on from the training at 224 px
    model, _, row = begin.partition(',')
    size, batch = (384, 512) if larger else (224, 1024)

    config = ConfigDict()
    config.seed = 0
    config.epochs = 30 if larger else 300

    tokens = dict(dist_token=True, dist_head=True) if row == 'tokens' else {}
    config.model = dict(
        name=f'vit-{model}', gelu='exact', drop_path=0.1, posemb_std=0.02, interpolation='bicubic',
        matmul_dtype='bfloat16', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **tokens,
    )  # fmt: skip
    taught = dict(
        name='distill', teacher=TEACHER, teacher_dtype='bfloat16', kind='hard', alpha=0.5
    )
    config.objective = dict(
        mixup=0.8, cutmix=1.0, mix_shift=3, label_smoothing=0.1, **(taught if row else {})
    )
    config.data = dict(
        source=dict(name='imagenet2012', split='train'),
        view=dict(name='inception_torchvision', method='bicubic'), image_size=size,
        augment=('randaugment_timm', 'erase'), repeats=3, batch_size=batch,
    )  # fmt: skip
    view = dict(
        name='small_central', smaller=size * 256 // 224, method='bicubic', antialias=True,
        rounding='torchvision',
    )  # fmt: skip
    config.evals = dict(test=dict(
        source=dict(name='imagenet2012', split='validation'), view=view, every=10_000
    ))  # fmt: skip
    config.optim = dict(
        name='adamw', schedule='cosine', warmup=round(5 * IMAGES / batch),
        **dict(lr=5e-6, end_lr=5e-6, weight_decay=1e-8)
        if larger
        else dict(lr=5e-4 * batch / 512, end_lr=1e-5, weight_decay=0.05),
    )  # fmt: skip
    if larger:
        config.init_from = f'runs/deit/{begin.replace("/", "_")}'
        config.keep_head = True
    config.checkpoint = dict(every=2_500)
    config.report = dict(every=100)
    config.expected = [
        published.expected(
            'deit.table3', ROWS[row], MODELS[model] + ' 384' * larger, 'test/accuracy'
        )
    ]
    return config
