"""Data sets as sequences of (image bytes, label), of many kinds, told apart by their name.

Folders of images, prepared records, tar shards (WebDataset), parquet files (Hugging Face), TFDS.
"""

import contextlib
import difflib
import importlib
import os
import sys
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from vit_jax.data import (
    facts,
    folders,
    jft_like,
    names,
    parquet,
    records,
    shards,
    tars,
    tfrecord,
    vtab,
)  # fmt: skip
from vit_jax.errors import UserError

BUILDERS = ('digits', 'fashion_mnist_debian')
MOST_CLASSES = 2**20  # that go without names
MOST_LABELS = 32  # of an image of TFDS
SMALL = 2**28  # bytes; reading and parsing a record takes longer than decoding a small image
SUFFIXES = tuple(f'.{suffix}' for suffix in tars.SUFFIXES)


class Source(NamedTuple):
    """A data set that can be read at any index; picklable, opened anew in worker processes."""

    records: Any  # len(records), records[i] -> (bytes, label)
    classes: tuple[str, ...]
    labels: str = 'by_name'  # how they are compared with a model's, see `names`

    def __len__(self):
        return len(self.records)

    def name(self, i):
        """What a person would call example i: a path, or the data set, split and index."""
        return self.records.name(i)


class Tfds:
    """A TFDS split in a random-access format; a `small` one stays in memory once it is read.

    `label` is a feature or a function of the example; a list of labels gets `max_labels` places,
    filled up with -1. `change` is done with the image's bytes.
    """

    def __init__(self, data, title, image, label, small, max_labels=None, change=None):
        self.data, self.title, self.image, self.label = data, title, image, label
        self.max_labels, self.change = max_labels, change
        self.kept = {} if small else None

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if self.kept is None:
            return self.read(i)
        if i not in self.kept:
            self.kept[i] = self.read(i)
        return self.kept[i]

    def read(self, i):
        example = self.data[i]
        image = example[self.image]
        label = self.label(example) if callable(self.label) else example[self.label]
        if self.max_labels is not None:
            if len(label) > self.max_labels:
                raise UserError(f'{self.name(i)} has {len(label)} labels, above {self.max_labels}')
            label = np.pad(np.asarray(label, np.int32), (0, self.max_labels - len(label)),
                           constant_values=-1)  # fmt: skip
        return self.change(image) if self.change else image, label

    def traits(self):
        info, split = self.data.dataset_info, self.data.split
        files = info.splits[split].file_instructions
        parts = [(os.path.basename(f.filename), f.skip, f.take, f.examples_in_shard) for f in files]
        names = {str(part.name): part.num_bytes for part in info.splits.values()}
        return [info.full_name, str(parts)], [str(sorted(names.items()))]

    def name(self, i):
        return f'{self.title}[{i}]'


class Part:
    """Examples `start` to `stop` of other records."""

    def __init__(self, whole, start, stop):
        self.whole, self.start, self.stop = whole, start, stop
        self.max_labels = getattr(whole, 'max_labels', None)

    def __len__(self):
        return self.stop - self.start

    def at(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f'no example {i} among {len(self)}')
        return int(i) + self.start

    def __getitem__(self, i):
        return self.whole[self.at(i)]

    def traits(self):
        order, contents = facts.traits(self.whole)
        return [str((self.start, self.stop)), *order], contents

    def name(self, i):
        return self.whole.name(self.at(i))


def load(
    *,
    name: str,
    split: str = 'train',
    data_dir: str | None = None,
    image: str = 'image',
    label: str = 'label',
    labels: Literal['by_name', 'by_number'] = 'by_name',
):
    """The data set `name`, of a kind that its name and its files tell:

    - a folder with manifest.json: records, as `python -m vit_jax.data.prepare` writes them
    - tar shards: `x-{0000..0146}.tar`, `x-*.tar`, a folder that holds them, train/ and val/ in it
    - parquet files in the same ways, or in data/; the arrow files of Hugging Face's save_to_disk
    - any other folder: images in class/*, or in train/class/* and val/class/*
    - jft_like:EXAMPLESxCLASSES: images that are drawn as they are read
    - vtab:TASK: a task of VTAB-1k, from TFDS
    - else TFDS, as it is prepared in data_dir

    All but those of TFDS may be at an address (gs://, https://); a folder of images at gs:// only.

    `split` is one of TFDS's ('train', 'train[:90%]'), or one of those that a folder or the names
    of its shards are divided into, or a share of one in percent: of a folder of images by a hash
    of the file's name, of others by position. A pattern is all of 'train'. `image` and `label`
    name the features of TFDS, the columns of parquet, the extension and json field in a tar.

    `labels` are compared with those of a model or of other data sets 'by_name' of the class, or
    'by_number'. Classes whose names are numbers, as folders have them, are in their numbers' order.
    """
    found = found_by(name, split, data_dir, image, label)
    return Source(found.records, found.classes, labels)


def found_by(name, split, data_dir, image, label):
    """`load`, whose labels are by name."""
    if name.startswith('jft_like:'):
        records_, classes = jft_like.named(name, split.partition('[')[0])
        return portion(records_, classes, split)
    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    if name.startswith('vtab:'):
        return vtab_task(name, split, data_dir)
    address = os.path.expanduser(name)
    exists = '://' not in name and os.path.exists(address)
    if not exists and ('*' in name or '{' in name) or address.endswith(shards.SHARDS) and not (
        os.path.isdir(address)
    ):
        return sharded({'train': shards.expanded(address)}, address, split, image, label)
    if name.startswith(('/', '.', '~')) or '://' in name or os.path.isdir(address):
        return at(address, split, image, label)
    return tfds(name, split, data_dir=data_dir, image=image, label=label)


def at(address, split, image, label):
    """The data set in a folder, a path or an address, by what is in it."""
    files, folders = shards.listed(address)
    if {records.MANIFEST, records.JOURNAL} & files:
        found = records.Records(address, split.partition('[')[0])
        return portion(found, found.classes, split)
    parts = shards.find_shards(address, files, folders)
    if parts:
        return sharded(parts, address, split, image, label)
    try:
        path = epath.Path(address)
    except KeyError:  # of an address that epath does not know
        raise UserError(
            f'{address} has no {records.MANIFEST}, and no *.tar or *.parquet that its server '
            'lists; name shards as ADDRESS/x-{000..146}.tar'
        ) from None
    return folder(path, split)


def portion(found, classes, split):
    """A Source of records, or of a share of them by position."""
    _, low, high = share(split)
    if (low, high) != (0, 100):
        start, stop = (round(len(found) * percent / 100) for percent in (low, high))
        found = Part(found, start, stop)
    if not len(found):
        raise UserError(f'split {split!r} has no examples')
    return Source(found, tuple(classes))


def sharded(parts, address, split, image, label):
    """A split of tar, parquet or arrow files; `parts` are {split: files}."""
    part, _, _ = share(split)
    if part not in parts:
        raise UserError(f'{address} has no split {part!r}; it has {", ".join(sorted(parts))}')
    files = parts[part]
    kinds = {os.path.splitext(file.partition('?')[0])[1] for file in files}
    if len(kinds) != 1 or not kinds <= set(shards.SHARDS):
        kinds = ', '.join(sorted(kinds))
        raise UserError(f'{address}: files are {kinds}, not one of {", ".join(shards.SHARDS)}')
    kind, opened = (tars, tars.Tars) if kinds == {'.tar'} else (parquet, parquet.Rows)
    found = opened(files, image=image, label=label)
    folders = [os.path.dirname(files[0])]
    if os.path.basename(folders[0]) in (part, 'data'):
        folders.append(os.path.dirname(folders[0]))
    names = kind.class_names(found, folders, label)
    if names is None:
        highest = found.labels.max(initial=-1)
        if part != 'train' and 'train' in parts:  # whose classes are those of the others
            others = opened(parts['train'], image=image, label=label)
            highest = max(highest, others.labels.max(initial=-1))
        if highest >= MOST_CLASSES:
            raise UserError(f'{address} has a label {highest}, and no list of class names')
        names = map(str, range(highest + 1))
    return portion(found, names, split)


def tfds(name, split, *, data_dir=None, image='image', label='label'):
    """A TFDS data set; those of the repository are prepared at their first use."""
    import tensorflow_datasets as tfds_lib

    if name in BUILDERS:
        module = f'vit_jax.data.builders.{name}.{name}_dataset_builder'
        builder = importlib.import_module(module).Builder(data_dir=data_dir)
        if not sys.stderr.isatty():
            tfds_lib.disable_progress_bar()
        try:
            builder.download_and_prepare(file_format='array_record')
        except ModuleNotFoundError as e:
            raise UserError(
                f'data set {name} needs {e.name}; install it with: pip install "vit_jax[{name}]"'
            ) from e
    else:
        builder = prepared(name, data_dir)
    features = builder.info.features
    for key in (image, label):
        if key not in features:
            raise UserError(
                f'data set {name} has no feature {key!r}, but {", ".join(sorted(features))}'
            )
    one = getattr(features[label], 'feature', features[label])  # of a sequence of labels
    if getattr(one, 'names', None) is None:
        raise UserError(f'feature {label!r} of data set {name} is no class label')
    most = None if one is features[label] else MOST_LABELS
    tfrecords = builder.info.available_file_formats() == {tfds_lib.core.FileFormat.TFRECORD}
    with explained(builder, name, split):
        if tfrecords and most is None:
            found = tfrecord.of_builder(builder, split, image=image, label=label)
        else:
            data = random_access(builder, split, image)
            small = builder.info.dataset_size < SMALL
            found = Tfds(data, f'{name}/{split}', image, label, small, most)
    return Source(found, tuple(one.names))


def vtab_task(name, split, data_dir=None):
    """A split of a task of VTAB-1k."""
    task = vtab.task(name)
    builder = prepared(task.dataset, data_dir)
    sizes = {part: info.num_examples for part, info in builder.info.splits.items()}
    part = vtab.split_of(task, split, sizes)
    with explained(builder, task.dataset, part):
        data = random_access(builder, part, 'image')
    if isinstance(task.label, str):
        names = builder.info.features[task.label].names
    else:
        names = map(str, range(task.classes))
    change = vtab.brightened if task.bright else None
    small = builder.info.dataset_size < SMALL or split != 'test'
    found = Tfds(data, f'{name}/{split}', 'image', task.label, small, change=change)
    return Source(found, tuple(names))


def random_access(builder, split, image):
    """A split as a sequence of examples whose images are not decoded."""
    import tensorflow_datasets as tfds_lib

    return builder.as_data_source(split, decoders={image: tfds_lib.decode.SkipDecoding()})


@contextlib.contextmanager
def explained(builder, name, split):
    """Says of a data set that can't be opened why, and the way out."""
    try:
        yield
    except NotImplementedError as e:
        raise UserError(
            f'data set {name} is not prepared in a random-access format in {builder.data_dir}; '
            f'prepare it with: tfds build {name} --file_format=array_record'
        ) from e
    except ValueError as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f'data set {name} has no split {split!r}; it has {", ".join(builder.info.splits)}'
        ) from e


def prepared(name, data_dir):
    """The builder of a data set that stands prepared in data_dir, by the files alone."""
    import tensorflow_datasets as tfds_lib

    try:
        builder = tfds_lib.builder(name, data_dir=data_dir, try_gcs=False)
    except (tfds_lib.core.DatasetNotFoundError, ModuleNotFoundError, ValueError) as e:
        # ValueError: a name that none of TFDS's can be, as that of a folder that is not there
        known = [*BUILDERS, *tfds_lib.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name.split('/')[0].split(':')[0], known, 3)
        hint = f' Did you mean {" or ".join(near)}?' if near else ''
        raise UserError(
            f'no data set {name!r} is prepared.{hint} A folder of images, records, tar or parquet '
            'files is given by its path or address, shards also as x-{000..146}.tar or x-*.tar.'
        ) from e
    if not builder.info.splits:
        raise UserError(
            f'data set {name} is not prepared in {builder.data_dir}; prepare it with: '
            f'tfds build {name} --file_format=array_record'
        )
    return builder


def folder(path, split):
    """Images in path/class/*, or in path/train/class/* and path/val/class/*."""
    if not path.is_dir():
        raise UserError(f'no folder {path}')
    part, low, high = share(split)
    inner = [d.name for d in path.iterdir() if d.is_dir() and not d.name.startswith('.')]
    divided = 'train' in inner
    if divided and part not in inner:
        raise UserError(f'{path} has no sub-folder {part!r}, but {", ".join(sorted(inner))}')
    if not divided and part != 'train':
        raise UserError(
            f'{path} is not divided into train and val; name a share, as train[:90%] or train[90%:]'
        )
    root = path / part if divided else path
    top = path / 'train' if divided else path
    inner = [d.name for d in top.iterdir() if d.is_dir() and not d.name.startswith('.')]
    classes = names.in_order(inner, top)
    if len(classes) < 2:
        raise UserError(
            f'{top} has {len(classes)} class folders; a data set needs two or more, or else '
            f'{records.MANIFEST}, *.tar or *.parquet'
        )
    paths, labels = [], []
    for d in sorted(root.iterdir()):
        if not d.is_dir() or d.name.startswith('.'):
            continue
        if d.name not in classes:
            raise UserError(f'{d} is a class that {top} does not have')
        files = [
            file for file in sorted(d.iterdir())
            if file.name.lower().endswith(SUFFIXES) and not file.name.startswith('.')
        ]  # fmt: skip
        if not files:
            raise UserError(f'no images in {d} ({", ".join(SUFFIXES)})')
        chosen = [str(f) for f in files if low <= folders.percentile(f'{d.name}/{f.name}') < high]
        paths += chosen
        labels += [classes.index(d.name)] * len(chosen)
    if not paths:
        raise UserError(f'no images in {root}/*/ for split {split!r} ({", ".join(SUFFIXES)})')
    return Source(folders.Files(str(root), paths, labels), tuple(classes))


def share(split):
    """'train[10%:90%]' to ('train', 10, 90)."""
    name, _, rest = split.partition('[')
    if not rest:
        return name, 0, 100
    bounds = rest.rstrip(']').split(':')
    try:
        if len(bounds) != 2 or not rest.endswith(']'):
            raise ValueError
        low, high = (
            float(b.removesuffix('%')) if b else d for b, d in zip(bounds, (0, 100), strict=True)
        )
        if not all(b.endswith('%') for b in bounds if b) or not 0 <= low < high <= 100:
            raise ValueError
    except ValueError:
        raise UserError(f'split {split!r} is not of the form train[10%:90%]') from None
    return name, low, high
