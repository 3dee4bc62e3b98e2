"""Fine-tuning by the protocol of arXiv:2010.11929 (appendix B.1.1): FILE:DATASET[,UPSTREAM,WORDS].

Published from ImageNet-21k (table 5), in percent; not yet run here on these data sets:

                        B/16    B/32    L/16    L/32    H/14
    cifar10            98.95   98.79   99.16   99.13   99.27
    cifar100           91.67   91.97   93.44   93.04   93.82
    imagenet2012       83.97   81.28   85.15   80.99   85.13
    oxford_flowers102  99.38   99.11   99.61   99.19   99.51
    oxford_iiit_pet    94.43   93.02   94.73   93.09   94.82

FILE:DATASET starts from --config.init_from=X, for any X that vit_jax.load accepts. The recipe has
SGD with momentum 0.9, batches of 512, cosine decay, gradients clipped at norm 1, no weight decay,
384 px (378 for patches of 14) and a new head of zeros. Steps are those of table 4; warm-up,
learning rate, splits and crops are those of big_vision's transfer recipe, which chose the rate by
validation accuracy for AugReg's B/32 (arXiv:2106.10270). Any other TFDS name, or the path of a
folder of images, has 2,500 steps, as in VTAB: vtab:caltech101 and its other tasks, with images
resized regardless of aspect ratio.

FILE:DATASET,UPSTREAM is a cell of a published table. UPSTREAM is one of
- an argument of experiments/pretrain.py (h/14, r50x1-sgd, b/16-i1k): starts from the workdir of
  that run, runs/pretrain/h_14; b/16, b/32, l/16, l/32, r50+b/16 and h/14 with -i21k start from the
  paper's public checkpoint;
- a public checkpoint: augreg/s_16-i21k, mixer/b_16-i1k;
- a run of experiments/augreg.py: augreg:s/16-i1k300.
WORDS are any of 512 or 224 (pixels), polyak (averaged parameters: table 2), dropout, steps=500 and
v2 (tests on ImageNet V2 too: AugReg's column i21kv2 has the point of the grid with the highest
v2/accuracy, such as augreg:s/16-i21k300-light1-wd_0.03-do_0.0; here one point per model is listed).

Variations by one flag: --config.optim.layer_decay=0.75 (layer-wise rates), --config.optim.only=head
(linear probe), --config.optim.freeze=embedding, --config.model.drop_path=0.1,
--config.keep_head=true.
"""

import os
import re

from ml_collections import ConfigDict

from vit_jax.data import sources
from vit_jax.data.readers import vtab
from vit_jax.errors import UserError
from vit_jax.tables import published

PRESETS = {  # percent of `train` to train on, test split, steps, warm-up, learning rate, view
    'cifar10': (98, 'test', 10_000, 500, 0.003, 'random_crop'),
    'cifar100': (98, 'test', 10_000, 500, 0.01, 'random_crop'),
    'imagenet2012': (99, 'validation', 20_000, 500, 0.03, 'inception'),
    'oxford_flowers102': (90, 'test', 500, 100, 0.003, 'inception'),
    'oxford_iiit_pet': (90, 'test', 500, 100, 0.003, 'inception'),
}
CROP = 384 / 448  # of the smaller side

# {data set: its rows in tables 5, 2 and 7, its column in table 6}; None: not in that table.
NAMES = {
    'imagenet2012': ('ImageNet', 'ImageNet', 'ImageNet', 'ImageNet'),
    'cifar10': ('CIFAR-10', 'CIFAR-10', 'CIFAR10', 'CIFAR-10'),
    'cifar100': ('CIFAR-100', 'CIFAR-100', 'CIFAR100', 'CIFAR-100'),
    'oxford_iiit_pet': ('Oxford-IIIT-Pets', 'Oxford-IIIT Pets', 'Oxford-IIIT Pets', 'Pets'),
    'oxford_flowers102': (
        'Oxford Flowers-102', 'Oxford Flowers-102', 'Oxford Flowers-102', 'Flowers',
    ),
}  # fmt: skip
REAL = ('ImageNet ReaL', 'ImageNet ReaL', None, 'ImageNet ReaL')
VITS = ('b/16', 'b/32', 'l/16', 'l/32', 'h/14')
TABLE_2 = {'h/14': 'Ours-JFT (ViT-H/14)', 'l/16': 'Ours-JFT (ViT-L/16)',
           'l/16-i21k': 'Ours-I21k (ViT-L/16)'}  # fmt: skip
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
README = {'b/16-i21k': 'ViT-B_16', 'b/32-i21k': 'ViT-B_32', 'l/16-i21k': 'ViT-L_16',
          'l/32-i21k': 'ViT-L_32', 'r50+b/16-i21k': 'R50+ViT-B_16'}  # fmt: skip
MIXERS = {'mixer/b_16-i1k': ('ImageNet', 'Mixer-B/16'),
          'mixer/l_16-i1k': ('ImageNet', 'Mixer-L/16'),
          'mixer/b_16-i21k': ('ImageNet-21k', 'Mixer-B/16'),
          'mixer/l_16-i21k': ('ImageNet-21k', 'Mixer-L/16')}  # fmt: skip
AUGREG = {  # {row of AugReg's table 3: (public checkpoint, learning rate of its best fine-tuning)}
    'L/16': ('augreg/l_16-i21k', 0.01), 'B/16': ('augreg/b_16-i21k', 0.03),
    'S/16': ('augreg/s_16-i21k', 0.03), 'R50+L/32': ('augreg/r50_l_32-i21k', 0.01),
    'R26+S/32': ('augreg/r26_s_32-i21k', 0.03), 'Ti/16': ('augreg/ti_16-i21k', 0.03),
    'B/32': ('augreg/b_32-i21k', 0.01), 'S/32': ('augreg/s_32-i21k', 0.01),
    'R+Ti/16': ('augreg/r_ti_16-i21k', 0.03),
}  # fmt: skip
V2 = {  # point of the grid in the name of timm's checkpoint, 87.10% there and 87.08% here
    'L/16': '-medium1-wd_0.1-do_0.1',
}  # fmt: skip
TRANSFER = {'imagenet2012': 'ImageNet', 'cifar10': 'Cifar10', 'cifar100': 'Cifar100',
            'oxford_iiit_pet': 'Pets', 'oxford_flowers102': 'Flowers'}  # fmt: skip
WORDS = ('224', '384', '512', 'polyak', 'dropout', 'v2')
SHORT = ('b/16-i21k', (500, 1000))  # model and steps of the README's short schedules for CIFAR

ARGS = (
    *(f'{d},{m}' for m in TABLE_6 for d in NAMES),
    *(f'{d},{m}-{data}' for data in ('i21k', 'i1k') for m in VITS for d in NAMES
      if (m, data) != ('h/14', 'i1k')),
    *(f'{d},{m}' for m in TABLE_7 if m.endswith('sgd') for d in NAMES),
    *(f'imagenet2012,{m},512,polyak' for m in TABLE_2),
    *(f'vtab:{task},{m}' for m in TABLE_9 for task in TASKS),
    *(f'{d},r50+b/16-i21k' for d in ('cifar10', 'cifar100', 'imagenet2012')),
    *(f'{d},{m},dropout' for m in README for d in ('cifar10', 'cifar100', 'imagenet2012')),
    *(f'{d},{SHORT[0]},steps={n}' for n in SHORT[1] for d in ('cifar10', 'cifar100')),
    *(f'cifar10,{m},224' for m in MIXERS),
    *(f'imagenet2012,{name},{size}' for name, _ in AUGREG.values() for size in (384, 224)),
    *(f'imagenet2012,augreg:{row.lower()}-{data},{size}' for row in AUGREG
      for data in ('i1k300', 'i21k30') for size in (384, 224)),
    *(f'imagenet2012,augreg:{row.lower()}-i21k300{V2.get(row, "")},384,v2' for row in AUGREG),
    *(f'{d},augreg/b_32-i21k' for d in TRANSFER if d != 'imagenet2012'),
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
    return ','.join(parts[:n]), parts[n:]


def splits(name):
    """{name: split}: 'train' first, then the evaluations."""
    if name.startswith('vtab:'):
        return {'train': 'train800val200', 'test': 'test'}
    if name in PRESETS:
        share, test, *_ = PRESETS[name]
        return {'train': f'train[:{share}%]', 'val': f'train[{share}%:]', 'test': test}
    train, held_out = sources.held_out(name)
    return {'train': train, **held_out}


def model_name(size):
    """Model name 'vit-b/16', 'bit-r50x1' or 'r50+vit-b/16' for 'b/16', 'r50x1' or 'r50+b/16'."""
    root, _, vit = size.rpartition('+')
    if root:
        return f'{root}+vit-{vit}'
    return f'bit-{size}' if size.startswith('r') else f'vit-{size}'


def upstream(name):
    """(init_from, model name) of an UPSTREAM, see above."""
    if name.startswith(('augreg/', 'mixer/')):
        family, size = name.split('-')[0].split('/')
        root, _, vit = size.replace('_', '/').rpartition('/')  # 'r50/l', '32'
        size = f'{root}/{vit}'.replace('/', '+', root.count('/'))
        return name, f'mixer-{size}' if family == 'mixer' else model_name(size)
    kind, _, size = name.rpartition(':')
    size = size.split('-')[0]
    if not kind and name.endswith('-i21k'):
        return f'vit/{size.replace("/", "_").replace("+", "_")}-i21k', model_name(size)
    run = name.rpartition(':')[2].replace('/', '_')
    return f'runs/{kind or "pretrain"}/{run}', model_name(size)


def of_table_5(name):
    """(pre-training data, column) of an UPSTREAM in table 5, or None."""
    size, _, data = name.partition('-')
    data = {'': 'JFT-300M', 'i21k': 'ImageNet-21k', 'i1k': 'ImageNet'}.get(data)
    return (data, f'ViT-{size.upper()}') if data and size in VITS else None


def augreg_row(name):
    """The row of an UPSTREAM in AugReg's table 3, or None."""
    for row, (checkpoint, _) in AUGREG.items():
        if name == checkpoint or name.startswith(f'augreg:{row.lower()}-'):
            return row
    return None


def claims(dataset, name, words):
    """Cells of published tables that a run reproduces; for ImageNet also with ReaL's labels."""
    rows, words = [], set(words)
    add = lambda *cell, **how: rows.append(published.expected(*cell, **how))  # noqa: E731
    if dataset.startswith('vtab:'):
        task = TASKS[dataset.removeprefix('vtab:')]
        return [published.expected('vit.table9', TABLE_9[name], task, 'test/accuracy')]
    if name in MIXERS:
        return [published.expected('vt.mixer', (*MIXERS[name], 'cifar10'), 'accuracy',
                                   'test/accuracy')]  # fmt: skip
    if 'v2' in words:
        add('augreg.table3', augreg_row(name), '384 i21kv2', 'test/accuracy')
        return rows
    if 'polyak' in words:
        add('vit.table2', 'ImageNet', TABLE_2[name], 'test/accuracy')
        add('vit.table2', 'ImageNet ReaL', TABLE_2[name], 'real/accuracy')
        return rows
    steps = next((w.removeprefix('steps=') for w in words if w.startswith('steps=')), None)
    if steps:
        row = ('imagenet21k', 'ViT-B_16', dataset, f'{steps} / {int(steps) // 10}')
        return [published.expected('vt.short_finetune', row, 'accuracy', 'test/accuracy')]
    if name in README and dataset in ('cifar10', 'cifar100', 'imagenet2012'):
        column = f'acc dropout={0.1 if "dropout" in words else 0.0}'
        add('vt.expected_finetune', (README[name], dataset), column, 'test/accuracy')
    if 'dropout' in words:
        return rows
    size = 224 if '224' in words else 384
    row, public = augreg_row(name), not name.startswith('augreg:')
    if dataset == 'imagenet2012' and row:
        data = 'i21k300' if public else name.rpartition('-')[2]
        add('augreg.table3', row, f'{size} {data}', 'test/accuracy')
        if public and size == 384:
            add('vt.checkpoints_augreg', row, 'Imagenet accuracy', 'test/accuracy')
    if name == 'augreg/b_32-i21k' and size == 384:
        add('bv.transfer', TRANSFER[dataset], 'mean %', 'test/accuracy')
    evaluations = [('test/accuracy', NAMES[dataset])]
    evaluations += [('real/accuracy', REAL)] if dataset == 'imagenet2012' else []
    for metric, (five, two, seven, six) in evaluations:
        place = of_table_5(name)
        if place:
            add('vit.table5', (place[0], five), place[1], metric)
        if name in TABLE_2 and 'ImageNet' not in two:
            add('vit.table2', two, TABLE_2[name], metric)
        if name in TABLE_6:
            add('vit.table6', TABLE_6[name], six, metric)
        if name in TABLE_7 and seven:
            add('vit.table7', seven, TABLE_7[name], metric)
    return rows


def get_config(arg='cifar10'):
    name, words = divided(arg)
    *_, steps, warmup, lr, view = PRESETS.get(name, (2_500, 500, 0.01, 'inception'))
    train, *tests = splits(name).items()
    size = next((int(w) for w in words if w in ('224', '512')), 384)
    if words and words[0].startswith('h/14'):  # patches of 14 pixels
        size = {512: 518, 384: 378, 224: 224}[size]

    config = ConfigDict()
    config.seed = 0
    config.steps = steps

    config.model = dict()  # read from init_from
    evaluation = dict(name='central', crop=CROP)
    if name.startswith('vtab:'):
        view = evaluation = 'resize'
    config.data = dict(
        source=dict(name=name, split=train[1]),
        view=dict(name=view, crop=CROP) if view == 'random_crop' else view,
        image_size=size,
        batch_size=512,
    )
    config.evals = {
        part: dict(source=dict(name=name, split=split), view=evaluation, every=max(steps // 10, 1))
        for part, split in tests
    }  # fmt: skip

    config.optim = dict(name='sgd', momentum=0.9, lr=lr, warmup=warmup, clip=1.0)
    config.checkpoint = dict(every=1000)
    config.report = dict(every=50)

    if words:
        begin, model = upstream(words[0])
        config.init_from, config.model.name = begin, model
        if 'dropout' in words:
            config.model.dropout = 0.1
        if 'polyak' in words:
            config.optim.ema = 0.9999
        if 'v2' in words:
            v2 = dict(name='imagenet_v2/matched-frequency', split='test')
            config.evals.v2 = dict(source=v2, view=evaluation)
        for word in words:
            if word.startswith('steps='):
                config.steps = int(word.removeprefix('steps='))
                config.optim.warmup = config.steps // 10
        if augreg_row(words[0]):
            config.optim.lr = AUGREG[augreg_row(words[0])][1]
        if name == 'imagenet2012':
            real = dict(name='imagenet2012_real', split='validation', label='real_label')
            config.evals.real = dict(source=real, view=evaluation)
        config.expected = claims(name, words[0], words[1:]) if arg in ARGS else []
    return config
