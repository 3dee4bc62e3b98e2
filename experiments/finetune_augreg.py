"""AugReg's fine-tuning (arXiv:2106.10270): FILE:DATASET,MODEL-DATA[,224][,v2].

Published on ImageNet from ImageNet-21k for 300 epochs (table 3), in percent; not yet run here:

             L/16   B/16   S/16  R50+L/32  R26+S/32  Ti/16   B/32   S/32  R+Ti/16
    224 px  83.98  83.96  80.46   82.74     80.81    73.75  79.13  73.47   69.69
    384 px  85.59  85.49  83.73   85.99     83.85    78.22  83.59  79.58   75.40

MODEL and DATA are those of experiments/augreg.py. i21k300 starts from the paper's public
checkpoint, i1k300 and i21k30 from the workdir of that run. On imagenet2012 the better of the rates
of table 4 by accuracy on the last hundredth of train is the result (launch.sh --select), at 384 px
from i21k300 the one in the name of the public result. SGD with momentum 0.9 in bfloat16, batches of
512, 20,000 steps, 500 of warm-up, cosine decay, clipping at norm 1: section 3.5 and big_vision
configs/transfer.py, which its issue 60 names; so are the views, training on 99% of train. At 224 px
tests see the centre of images whose smaller side is 256, as in pre-training.

v2 is the column i21kv2: the point of the grid of upstream models and rates with the best accuracy
on ImageNet V2. Those of L/16, B/16 and R50+L/32 are known by the names of timm's checkpoints, with
87.08, 86.00 and 86.18% by its evaluation; the others choose among the public checkpoints.

vtab:TASK is a number of table 5: rates {0.001, 0.003, 0.01, 0.03} by {500, 2,500} steps, chosen on
200 of the 1,000 images. We know neither its size nor its views: 384 px, or 224, and those of
experiments/finetune.py. The paper has 27 models, which are MODEL-DATA here.
"""

import itertools

from ml_collections import ConfigDict

from vit_jax.data.readers import vtab
from vit_jax.errors import UserError, check_choice
from vit_jax.tables import published

MODELS = {  # name of the model; rate and point (by its file) of the public checkpoint at 384 px
    'l/16': ('vit-l/16', 0.01, 'strong1-wd_0.1-do_0.0'),
    'b/16': ('vit-b/16', 0.03, 'medium1-wd_0.1-do_0.0'),
    's/16': ('vit-s/16', 0.03, 'light1-wd_0.03-do_0.0'),
    'r50+l/32': ('r50+vit-l/32', 0.01, 'medium1-wd_0.1-do_0.1'),
    'r26+s/32': ('r26+vit-s/32', 0.01, 'light1-wd_0.1-do_0.0'),
    'ti/16': ('vit-ti/16', 0.03, 'none-wd_0.03-do_0.0'),
    'b/32': ('vit-b/32', 0.01, 'light1-wd_0.1-do_0.0'),
    's/32': ('vit-s/32', 0.01, 'none-wd_0.1-do_0.0'),
    'r+ti/16': ('r+vit-ti/16', 0.03, 'none-wd_0.03-do_0.0'),
}
V2 = {  # rate and point of the best on V2, by the names of timm's checkpoints
    'l/16': (0.01, 'medium1-wd_0.1-do_0.1'), 'b/16': (0.01, 'medium1-wd_0.1-do_0.0'),
    'r50+l/32': (0.01, 'medium2-wd_0.1-do_0.0'),
}  # fmt: skip
POINTS = [  # the augmentations as the files name them
    f'{augmentation}-wd_{decay}-do_{rate}' for augmentation, decay, rate in itertools.product(
        ('none', 'light0', 'light1', 'medium1', 'medium2', 'strong1', 'strong2'),
        (0.1, 0.03), (0.0, 0.1))
]  # fmt: skip
DATA = ('i1k300', 'i21k30', 'i21k300')
ARGS = (
    *(f'imagenet2012,{m}-{data}{size}' for m in MODELS for data in DATA for size in ('', ',224')),
    *(f'imagenet2012,{m}-i21k300,v2' for m in MODELS),
)


def checkpoint(model, point):
    """Address of the public checkpoint of a model and a point, ImageNet-21k for 300 epochs."""
    name = model.replace('/', '_').replace('+', '_')
    name = '_'.join(part if part.isdigit() else part.capitalize() for part in name.split('_'))
    return (
        f'gs://vit_models/augreg/{name}-i21k-300ep-lr_0.001-aug_{point}-sd_{point[-3:]}.npz'
    )


def get_config(arg='imagenet2012,s/16-i21k300'):
    name, pair, *words = *arg.split(','), ''
    words = words[:-1]
    model, _, data = pair.rpartition('-')
    if name != 'imagenet2012':
        check_choice('data set', name, ('imagenet2012', *(f'vtab:{t}' for t in vtab.TASKS)))
    check_choice('model', model, MODELS)
    check_choice('data', data, DATA)
    allowed = ('224', 'v2') if name == 'imagenet2012' and data == 'i21k300' else ('224',)
    if not set(words) <= set(allowed):
        raise UserError(f'{arg!r} has other words than {", ".join(allowed)}')
    size = 224 if '224' in words else 384
    task = name.removeprefix('vtab:')
    rates = (0.01, 0.03) if task == name else (0.001, 0.003, 0.01, 0.03)
    kind, rate, point = MODELS[model]
    known = data == 'i21k300' and size == 384 and 'v2' not in words and task == name
    if 'v2' in words:
        known, (rate, point) = model in V2, V2.get(model, (rate, point))

    config = ConfigDict()
    config.seed = 0
    config.steps = 20_000 if task == name else 2_500

    config.model = dict(name=kind)
    public = 'augreg/' + model.replace('/', '_').replace('+', '_') + '-i21k'
    config.init_from = f'runs/augreg/{pair.replace("/", "_")}'
    if data == 'i21k300':
        config.init_from = checkpoint(model, point) if 'v2' in words else public
    if task == name:
        view = dict(name='inception', antialias=False)
        evaluation = dict(name='small_central', smaller=448 if size == 384 else 256)
        train, tests = 'train[:99%]', dict(val='train[99%:]', test='validation')
    else:
        evaluation = view = dict(name='resize', antialias=False)
        if task != 'dsprites_location':
            resize = size if task in vtab.NOT_CROPPED else round(size * 448 / 384)
            flip = task not in vtab.NOT_FLIPPED
            view = dict(name='resize_crop', resize=resize, flip=flip, antialias=False)
        train, tests = 'train800val200', dict(test='test')
    config.data = dict(
        source=dict(name=name, split=train), view=view, image_size=size, batch_size=512
    )
    config.evals = {
        part: dict(source=dict(name=name, split=split), view=evaluation, every=2_000)
        for part, split in tests.items()
    }
    if 'v2' in words:
        v2 = dict(name='imagenet_v2/matched-frequency', split='test')
        config.evals.v2 = dict(source=v2, view=evaluation)
    config.optim = dict(
        name='sgd', momentum=0.9, momentum_dtype='bfloat16', lr=rate, clip=1.0,
        warmup=500 if task == name else 200,
    )  # fmt: skip
    config.checkpoint = dict(every=1000)
    config.report = dict(every=50)

    grid = [{'optim.lr': rate} for rate in rates]
    if task != name:
        grid = [{'steps': n, 'optim.warmup': warmup, **one}
                for n, warmup in ((500, 100), (2_500, 200)) for one in grid]  # fmt: skip
        val = dict(source=dict(name=name, split='val200'), view=evaluation)
        config.select = dict(
            metric='val/accuracy', grid=grid, split='train800', evals=dict(val=val)
        )
    elif not known:
        if 'v2' in words:
            grid = [{'init_from': checkpoint(model, p), **one} for p in POINTS for one in grid]
        config.select = dict(metric='v2/accuracy' if 'v2' in words else 'val/accuracy', grid=grid)

    row = model.upper().replace('TI', 'Ti')
    if arg in ARGS:
        column = f'{size} {"i21kv2" if "v2" in words else data}'
        config.expected = [published.expected('augreg.table3', row, column, 'test/accuracy')]
        if known and 'v2' not in words:
            config.expected.append(published.expected(
                'vt.checkpoints_augreg', row, 'Imagenet accuracy', 'test/accuracy'
            ))  # fmt: skip
    return config
