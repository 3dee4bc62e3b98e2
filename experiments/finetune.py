"""Fine-tuning by arXiv:2010.11929 (appendix B.1.1): FILE:DATASET[,UPSTREAM[,WORDS]].

Published from ImageNet-21k (table 5), in percent; not yet run here on these data sets:

                        B/16    B/32    L/16    L/32    H/14
    cifar10            98.95   98.79   99.16   99.13   99.27
    cifar100           91.67   91.97   93.44   93.04   93.82
    imagenet2012       83.97   81.28   85.15   80.99   85.13
    oxford_flowers102  99.38   99.11   99.61   99.19   99.51
    oxford_iiit_pet    94.43   93.02   94.73   93.09   94.82

FILE:DATASET starts from --config.init_from=X, for any X that vit_jax.load accepts. The recipe has
SGD with momentum 0.9 in bfloat16, batches of 512, cosine decay, gradients clipped at norm 1, no
weight decay, 384 px (378 for patches of 14) and a new head of zeros. It trains on all of train at a
rate of table 4, where appendix B.1.1 has 0.06 on ImageNet for ResNets and hybrids alone; launch.sh
--select first chooses that by accuracy on a part of train, for ResNets among these and BiT's
fine-tuning (arXiv:1912.11370 section 3.3). Training crops are Inception's, as vision_transformer's
issues 46 and 53 say of these runs, or with the word crop those of BiT, which the paper names for
VTAB alone. Tests see the whole image (vision_transformer, input_pipeline.py:213). Momentum and 500
steps of warm-up are those of its configs/common.py:43 and 68, 100 steps for Pets and Flowers those
of big_vision configs/transfer.py:75-77.

Any other TFDS name, or the path of a folder of images, has 2,500 steps, as VTAB has:
vtab:caltech101 and its other tasks, with BiT's crops (its appendix F) and a rate of 0.01.

UPSTREAM is one of
- an argument of experiments/pretrain.py (h/14, r50x1-sgd, b/16-i1k): starts from the workdir of
  that run, runs/pretrain/h_14; b/16, b/32, l/16, l/32, r50+b/16 and h/14 with -i21k start from the
  paper's public checkpoint;
- a public checkpoint: augreg/s_16-i21k, mixer/b_16-i1k;
- a run of experiments/augreg.py: augreg:s/16-i1k300;
- b/16-masked, the run of experiments/masked_patch.py on JFT: 79.9% on ImageNet (section 4.6).
The second and third have published numbers by protocols of their own,
experiments/finetune_augreg.py, finetune_readme.py and transfer.py. WORDS are any of 512 or 224
(pixels), polyak (averaged parameters: table 2), dropout, crop, steps=500, v2 and objectnet (further
test sets). ObjectNet (D.10) is the folder objectnet: its images of classes of ImageNet, labelled
with all of these.

G/14 is published with 90.45% (arXiv:2106.04560); how it is fine-tuned is not, so as H/14 is.
Variations by one flag: --config.optim.layer_decay=0.75 (layer-wise rates), --config.optim.only=head
(linear probe), --config.optim.freeze=embedding, --config.model.drop_path=0.1,
--config.keep_head=true.
"""

import os
import re

from ml_collections import ConfigDict

from vit_jax.data import sources
from vit_jax.data.readers import vtab
from vit_jax.errors import UserError, check_choice
from vit_jax.tables import published

RATES = (0.001, 0.003, 0.01, 0.03)  # table 4
DATASETS = {  # test split, steps, warm-up, percent of train in development, rates, default rate
    'cifar10': ('test', 10_000, 500, 98, RATES, 0.003),
    'cifar100': ('test', 10_000, 500, 98, RATES, 0.01),
    'imagenet2012': ('validation', 20_000, 500, 99, (0.003, 0.01, 0.03, 0.06), 0.03),
    'oxford_flowers102': ('test', 500, 100, 90, RATES, 0.003),
    'oxford_iiit_pet': ('test', 500, 100, 90, RATES, 0.003),
}
WHOLE = dict(name='resize', antialias=False)
INCEPTION = dict(name='inception', antialias=False)
CROP = dict(name='resize_crop', antialias=False)  # BiT's; of 448 pixels for 384
WORDS = ('224', '384', '512', 'polyak', 'dropout', 'crop', 'v2', 'objectnet')

# {data set: its row in tables 5 and 2, row in table 7, column in table 6}
ROWS = {
    'imagenet2012': ('ImageNet', 'ImageNet', 'ImageNet', 'ImageNet'),
    'cifar10': ('CIFAR-10', 'CIFAR-10', 'CIFAR10', 'CIFAR-10'),
    'cifar100': ('CIFAR-100', 'CIFAR-100', 'CIFAR100', 'CIFAR-100'),
    'oxford_iiit_pet': ('Oxford-IIIT-Pets', 'Oxford-IIIT Pets', 'Oxford-IIIT Pets', 'Pets'),
    'oxford_flowers102': (
        'Oxford Flowers-102', 'Oxford Flowers-102', 'Oxford Flowers-102', 'Flowers',
    ),
}  # fmt: skip
REAL = ('ImageNet ReaL', 'ImageNet ReaL', None, 'ImageNet ReaL')
TABLE_2 = {'h/14': 'Ours-JFT (ViT-H/14)', 'l/16': 'Ours-JFT (ViT-L/16)',
           'l/16-i21k': 'Ours-I21k (ViT-L/16)'}  # fmt: skip
TABLE_5 = {'': 'JFT-300M', '-i21k': 'ImageNet-21k', '-i1k': 'ImageNet'}
VITS = ('b/16', 'b/32', 'l/16', 'l/32', 'h/14')
TABLE_6 = {  # the row, and the epochs
    'b/32': ('ViT-B/32', 7), 'b/16': ('ViT-B/16', 7), 'l/32': ('ViT-L/32', 7),
    'l/16-7ep': ('ViT-L/16', 7), 'l/16': ('ViT-L/16', 14), 'h/14': ('ViT-H/14', 14),
    'r50x1': ('ResNet50x1', 7), 'r50x2': ('ResNet50x2', 7), 'r101x1': ('ResNet101x1', 7),
    'r152x1': ('ResNet152x1', 7), 'r152x2': ('ResNet152x2', 7), 'r152x2-14ep': ('ResNet152x2', 14),
    'r200x3': ('ResNet200x3', 14), 'r50+b/32': ('R50x1+ViT-B/32', 7),
    'r50+b/16': ('R50x1+ViT-B/16', 7), 'r50+l/32': ('R50x1+ViT-L/32', 7),
    'r50+l/16-7ep': ('R50x1+ViT-L/16', 7), 'r50+l/16': ('R50x1+ViT-L/16', 14),
}  # fmt: skip
TABLE_7 = {'r50x1': 'R50 Adam', 'r50x1-sgd': 'R50 SGD', 'r152x2': 'R152x2 Adam',
           'r152x2-sgd': 'R152x2 SGD'}  # fmt: skip
TABLE_9 = {'h/14': 'ViT-H/14 (JFT)', 'l/16': 'ViT-L/16 (JFT)', 'l/16-i21k': 'ViT-L/16 (I21k)'}
TASKS = dict(zip(vtab.TASKS, published.table('vit.table9').columns[1:-1], strict=True))
CHANGELOG = {'b/16-i21k': 'ViT-B/16-224', 'l/16-i21k': 'ViT-L/16-224'}

PUBLIC = (*(f'{m}-i21k' for m in VITS), 'r50+b/16-i21k')
OTHERS = (*(f'augreg/{m}-i21k' for m in ('ti_16', 's_32', 's_16', 'b_32', 'b_16', 'l_16',
                                         'r_ti_16', 'r26_s_32', 'r50_l_32')),
          *(f'mixer/{m}-{data}' for m in ('b_16', 'l_16') for data in ('i1k', 'i21k')))  # fmt: skip
MASKED = 'b/16-masked'
OWN = (*TABLE_6, 'r50x1-sgd', 'r152x2-sgd', *PUBLIC, *(f'{m}-i1k' for m in VITS[:4]), 'G/14',
       MASKED)  # fmt: skip
AUGREG = re.compile(
    r'augreg:(ti/16|[sb]/(16|32)|l/16|r\+ti/16|r26\+s/32|r50\+l/32)-(i1k300|i21k30|i21k300)(-.+)?'
)

ARGS = (
    *(f'{d},{m}' for m in TABLE_6 for d in DATASETS),
    *(f'{d},{m}-{data}' for data in ('i21k', 'i1k') for m in VITS for d in DATASETS
      if (m, data) != ('h/14', 'i1k')),
    *(f'{d},{m}' for m in TABLE_7 if m.endswith('sgd') for d in DATASETS),
    *(f'imagenet2012,{m},512,polyak' for m in TABLE_2),
    *(f'vtab:{task},{m}' for m in TABLE_9 for task in TASKS),
    *(f'imagenet2012,{m},224' for m in CHANGELOG),
    'imagenet2012,h/14,512,polyak,objectnet', 'imagenet2012,G/14,512,polyak',
    f'imagenet2012,{MASKED}',
)  # fmt: skip


def divided(arg):
    """Splits an argument into (data set, words after it); the path of a folder may have commas."""
    parts = re.split(r',(?![^{]*\})', arg)  # as may the shards x-{a,b}.tar
    names = ((n, os.path.expanduser(','.join(parts[:n]))) for n in range(len(parts), 1, -1))
    paths = (n for n, path in names if os.path.isdir(path))
    n = next(paths, 1)
    for word in parts[n + 1 :]:
        if word not in WORDS and not re.fullmatch(r'steps=[1-9]\d{0,8}', word):
            raise UserError(f'{word!r} is none of {", ".join(WORDS)}, steps=NUMBER')
    if len({'224', '384', '512'} & set(parts[n + 1 :])) > 1:
        raise UserError(f'{arg!r} has several sizes; give one of 224, 384 and 512')
    return ','.join(parts[:n]), parts[n:]


def model_name(size):
    """Model name 'vit-b/16', 'bit-r50x1' or 'r50+vit-b/16' for 'b/16', 'r50x1' or 'r50+b/16'."""
    root, _, vit = size.rpartition('+')
    if root:
        return f'{root}+vit-{vit}'
    return f'bit-{size}' if size.startswith('r') else f'vit-{size}'


def upstream(name):
    """(init_from, model name) of an UPSTREAM, see above; raises UserError for an unknown one."""
    if name in OTHERS:
        family, size = name.split('-')[0].split('/')
        root, _, vit = size.replace('_', '/').rpartition('/')  # 'r50/l', '32'
        size = f'{root}/{vit}'.replace('/', '+', root.count('/'))
        return name, f'mixer-{size}' if family == 'mixer' else model_name(size)
    if not AUGREG.fullmatch(name):
        check_choice('upstream', name, (*OWN, *OTHERS, 'augreg:s/16-i1k300'))
    if name == MASKED:
        return 'runs/masked_patch/jft', 'vit-b/16'
    kind, _, run = name.rpartition(':')
    size = run.split('-')[0]
    if name in PUBLIC:
        return f'vit/{size.replace("/", "_").replace("+", "_")}-i21k', model_name(size)
    return f'runs/{kind or "pretrain"}/{run.replace("/", "_")}', model_name(size)


def claims(dataset, name, words):
    """Numbers of published tables that a run of one of the ARGS has, as lines of `expected`."""
    add = published.expected
    test = 'test/accuracy'
    if dataset.startswith('vtab:'):
        return [add('vit.table9', TABLE_9[name], TASKS[dataset.removeprefix('vtab:')], test)]
    if '224' in words:
        return [add('vt.changelog_224', CHANGELOG[name], 'top-1', test)]
    if name == MASKED:
        row = 'self-supervised masked-patch B/16 ImageNet top-1'
        return [add('vit.text', row, 'value', test)]
    if name == 'G/14':
        return [add('scalingvit.g14_verified', 'ViT-G/14 ImageNet top-1', 'value', test)]
    if 'objectnet' in words:
        return [add('vit.text', f'ViT-H/14 ObjectNet {top}', 'value', f'objectnet/{metric}')
                for top, metric in (('top-1', 'accuracy'), ('top-5', 'top5'))]  # fmt: skip
    evaluations = [(test, ROWS[dataset])]
    evaluations += [('real/accuracy', REAL)] if dataset == 'imagenet2012' else []
    size, _, data = name.partition('-')
    data = TABLE_5.get(f'-{data}' if data else '')
    rows = []
    for metric, (five, two, seven, six) in evaluations:
        if 'polyak' in words:
            rows.append(add('vit.table2', two, TABLE_2[name], metric))
            continue
        if data and size in VITS:
            rows.append(add('vit.table5', (data, five), f'ViT-{size.upper()}', metric))
        if name in TABLE_2 and 'ImageNet' not in two:
            rows.append(add('vit.table2', two, TABLE_2[name], metric))
        if name in TABLE_6:
            rows.append(add('vit.table6', TABLE_6[name], six, metric))
        if name in TABLE_7 and seven:
            rows.append(add('vit.table7', seven, TABLE_7[name], metric))
    return rows


def training_view(name, size, words):
    """The view of a training image of a data set, at a size in pixels."""
    task = name.removeprefix('vtab:')
    if name == task and 'crop' not in words:
        return INCEPTION
    if task == 'dsprites_location':
        return WHOLE
    resize = size if task in vtab.NOT_CROPPED else round(size * 448 / 384)
    return dict(CROP, resize=resize, flip=task not in vtab.NOT_FLIPPED)


def splits(name):
    """(training split, {evaluation: split}) of the final run."""
    if name.startswith('vtab:'):
        vtab.task(name)  # or an error that lists them
        return 'train800val200', {'test': 'test'}
    return ('train', {'test': DATASETS[name][0]}) if name in DATASETS else sources.held_out(name)


def selection(name, model, steps):
    """How the learning rate of a data set with a row in table 4 is chosen."""
    _, _, _, percent, rates, _ = DATASETS[name]
    grid = [{'optim.lr': rate} for rate in rates]
    # B.1.1: also BiT's, big_transfer bit_hyperrule.py:36-63 and, with momentum in float32,
    # bit_jax/train.py:113; 448 and 384 pixels are the paper's, bit_hyperrule.py:18 has 512 and 480.
    if model.startswith('bit'):
        size, resize = (128, 160) if name.startswith('cifar') else (384, 448)
        shares = (0.3, 0.6, 0.9) if steps > 500 else (0.4, 0.6, 0.8)
        grid.append({
            'optim.lr': 0.003, 'optim.schedule': 'step', 'optim.boundaries': shares,
            'optim.clip': None, 'optim.momentum_dtype': None,
            'objective.mixup': 0.1 if steps > 500 else 0.0,
            'data.view': dict(CROP, resize=resize), 'data.image_size': size,
        })  # fmt: skip
    return dict(
        metric='val/accuracy', grid=grid, split=f'train[:{percent}%]',
        evals=dict(val=dict(source=dict(name=name, split=f'train[{percent}%:]'), view=WHOLE)),
    )  # fmt: skip


def get_config(arg='cifar10'):
    name, rest = divided(arg)
    start, words = rest[0] if rest else None, rest[1:]
    begin, model = upstream(start) if start else (None, '')
    _, steps, warmup, *_, lr = DATASETS.get(name, ('', 2_500, 500, 0.01))
    given = next((int(w.removeprefix('steps=')) for w in words if w.startswith('steps=')), None)
    if given:
        steps, warmup = given, given // 10
    size = next((int(w) for w in words if w in ('224', '384', '512')), 384)
    if model.endswith('/14'):  # patches of 14 pixels
        size = {512: 518, 384: 378, 224: 224}[size]
    if model.startswith('mixer'):  # whose MLPs have a weight for each patch
        size = 224
    train, tests = splits(name)

    config = ConfigDict()
    config.seed = 0
    config.steps = steps

    config.model = dict()  # read from init_from
    config.data = dict(
        source=dict(name=name, split=train), view=training_view(name, size, words),
        image_size=size, batch_size=512,
    )  # fmt: skip
    every = max(steps // 10, 1)
    config.evals = {
        part: dict(source=dict(name=name, split=split), view=WHOLE, every=every)
        for part, split in tests.items()
    }
    config.optim = dict(
        name='sgd', momentum=0.9, momentum_dtype='bfloat16', lr=lr, warmup=warmup, clip=1.0
    )
    config.checkpoint = dict(every=1000)
    config.report = dict(every=50)
    if name in DATASETS:
        config.select = selection(name, model, steps)

    if start:
        config.init_from, config.model.name = begin, model
        if model == 'vit-G/14':
            config.model.pool = 'map'
        if name == 'imagenet2012':
            real = dict(name='imagenet2012_real', split='validation', label='real_label')
            config.evals.real = dict(source=real, view=WHOLE)
        config.expected = claims(name, start, words) if arg in ARGS else []
    if 'dropout' in words:
        if model.startswith('bit'):
            raise UserError(f'{arg!r}: ResNets have no dropout')
        config.model.dropout = 0.1
    if 'polyak' in words:
        config.optim.ema = 0.9999
    if 'v2' in words:
        v2 = dict(name='imagenet_v2/matched-frequency', split='test')
        config.evals.v2 = dict(source=v2, view=WHOLE)
    if 'objectnet' in words:
        source = dict(name='objectnet', split='test')
        config.evals.objectnet = dict(source=source, view=WHOLE)
    return config
