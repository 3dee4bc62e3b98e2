"""AugReg's fine-tuning (arXiv:2106.10270): FILE:DATASET,MODEL-DATA[,224][,v2|,grid].

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

cifar100, oxford_iiit_pet, resisc45 and kitti_distance have rates {0.001, 0.003, 0.01} by the two
lengths of training in table 4. The run with the best accuracy on validation images is the result;
none trains on these. Splits and views of the first two are those of big_vision configs/transfer.py,
splits of the others those of the full VTAB. The views of these two are not published: those of
experiments/finetune.py. We take the sizes of table 3.

grid chooses among the public checkpoints of all 28 upstream models as well, by accuracy on the
validation images of the data set, imagenet2012 included; without it the model is the best upstream.
The difference on the test images is figure 5. The figure has no numbers that can be read here.

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
RATES = (0.001, 0.003, 0.01)
SHORT, LONG = ((500, 100), (2_500, 200)), ((2_500, 200), (10_000, 500))  # steps and warm-up
DATASETS = {  # source; splits to train, choose and test on; rates; steps and warm-up
    'imagenet2012': (
        'imagenet2012', ('train[:99%]', 'train[99%:]', 'validation'), (0.01, 0.03), ((20_000, 500),)
    ),
    'cifar100': ('cifar100', ('train[:98%]', 'train[98%:]', 'test'), RATES, LONG),
    'oxford_iiit_pet': ('oxford_iiit_pet', ('train[:90%]', 'train[90%:]', 'test'), RATES, SHORT),
    'resisc45': ('vtab:resisc45', ('train', 'val', 'test'), RATES, LONG),
    'kitti_distance': ('vtab:kitti_distance', ('train', 'val', 'test'), RATES, SHORT),
    **{f'vtab:{t}': (f'vtab:{t}', ('train800val200', 'val200', 'test'), (*RATES, 0.03), SHORT)
       for t in vtab.TASKS},
}  # fmt: skip
TRANSFER = ('cifar100', 'oxford_iiit_pet', 'resisc45', 'kitti_distance')
SIZES = ('', ',224')
ARGS = (
    *(f'imagenet2012,{m}-{data}{size}' for m in MODELS for data in DATA for size in SIZES),
    *(f'imagenet2012,{m}-i21k300,v2' for m in MODELS),
    *(f'imagenet2012,{m}-i21k300,grid' for m in MODELS),
    *(f'{name},{m}-i21k300{size}{grid}' for name in TRANSFER for m in MODELS for size in SIZES
      for grid in ('', ',grid')),
)  # fmt: skip


def checkpoint(model, point):
    """Address of the public checkpoint of a model and a point, ImageNet-21k for 300 epochs."""
    name = model.replace('/', '_').replace('+', '_')
    name = '_'.join(part if part.isdigit() else part.capitalize() for part in name.split('_'))
    return (
        f'gs://vit_models/augreg/{name}-i21k-300ep-lr_0.001-aug_{point}-sd_{point[-3:]}.npz'
    )


def views(source, size):
    """(training view, test view) of a data set at a size in pixels."""
    smaller = 448 if size == 384 else 256
    central = dict(name='small_central', smaller=smaller)
    if source == 'cifar100':
        return dict(name='small_crop', smaller=smaller), central
    if not source.startswith('vtab:'):
        return dict(name='inception', antialias=False), central
    task, whole = source.removeprefix('vtab:'), dict(name='resize', antialias=False)
    if task == 'dsprites_location':
        return whole, whole
    resize = size if task in vtab.NOT_CROPPED else round(size * 448 / 384)
    flip = task not in vtab.NOT_FLIPPED
    return dict(name='resize_crop', resize=resize, flip=flip, antialias=False), whole


def parse(arg):
    """(data set, model, data, words) of an argument, or one clear error."""
    name, pair, *words = *arg.split(','), ''
    model, _, data = pair.rpartition('-')
    check_choice('data set', name, DATASETS)
    check_choice('model', model, MODELS)
    check_choice('data', data, DATA)
    allowed = ['224']
    if data == 'i21k300' and not name.startswith('vtab:'):
        allowed += ['grid', 'v2'] if name == 'imagenet2012' else ['grid']
    if not set(words[:-1]) <= set(allowed):
        raise UserError(f'{arg!r} has other words than {", ".join(allowed)}')
    if {'grid', 'v2'} <= set(words):
        raise UserError(f'{arg!r} has both grid and v2; leave one out')
    return name, model, data, words[:-1]


def expected(model, data, size, words):
    """The numbers of a run on ImageNet."""
    row, test = model.upper().replace('TI', 'Ti'), 'test/accuracy'
    column = f'{size} {"i21kv2" if "v2" in words else data}'
    rows = [published.expected('augreg.table3', row, column, test)]
    if data == 'i21k300' and size == 384 and not words:
        rows.append(published.expected('vt.checkpoints_augreg', row, 'Imagenet accuracy', test))
    return rows


def get_config(arg='imagenet2012,s/16-i21k300'):
    name, model, data, words = parse(arg)
    source, (train, val, test), rates, lengths = DATASETS[name]
    size = 224 if '224' in words else 384
    kind, rate, point = MODELS[model]
    known = name == 'imagenet2012' and data == 'i21k300' and size == 384 and not words
    if 'v2' in words:
        known, (rate, point) = model in V2, V2.get(model, (rate, point))
    upstream = 'augreg/' + model.replace('/', '_').replace('+', '_') + '-i21k'
    if data != 'i21k300':
        upstream = f'runs/augreg/{model.replace("/", "_")}-{data}'
    elif {'grid', 'v2'} & set(words):
        upstream = checkpoint(model, point)
    steps, warmup = lengths[-1]
    view, central = views(source, size)

    config = ConfigDict()
    config.seed = 0
    config.steps = steps

    config.model = dict(name=kind)
    config.init_from = upstream
    config.data = dict(
        source=dict(name=source, split=train), view=view, image_size=size, batch_size=512
    )

    def evaluation(split):
        return dict(source=dict(name=source, split=split), view=central)

    config.evals = dict(test=dict(evaluation(test), every=2_000))
    if not name.startswith('vtab:'):
        config.evals.val = dict(evaluation(val), every=2_000)
    if name == 'imagenet2012' and {'grid', 'v2'} & set(words):
        v2 = dict(name='imagenet_v2/matched-frequency', split='test')
        config.evals.v2 = dict(source=v2, view=central)
    config.optim = dict(
        name='sgd', momentum=0.9, momentum_dtype='bfloat16', lr=min(rate, rates[-1]), clip=1.0,
        warmup=warmup,
    )  # fmt: skip
    config.checkpoint = dict(every=1000)
    config.report = dict(every=50)

    if not known:
        grid = [{'optim.lr': rate} for rate in rates]
        if len(lengths) > 1:
            grid = [{'steps': n, 'optim.warmup': w, **one} for n, w in lengths for one in grid]
        if {'grid', 'v2'} & set(words):
            grid = [{'init_from': checkpoint(model, p), **one} for p in POINTS for one in grid]
        config.select = dict(metric='v2/accuracy' if 'v2' in words else 'val/accuracy', grid=grid)
    if name.startswith('vtab:'):
        config.select.update(split='train800', evals=dict(val=evaluation(val)))
    if arg in ARGS and name == 'imagenet2012' and 'grid' not in words:
        config.expected = expected(model, data, size, words)
    return config
