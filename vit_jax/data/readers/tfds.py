"""Opens prepared data sets of TFDS by name, those of VTAB-1k among them."""

import contextlib
import difflib
import importlib
import os
import sys

import numpy as np

from vit_jax.data.readers import splits, tfrecord, vtab
from vit_jax.errors import UserError

BUILDERS = ('digits', 'fashion_mnist_debian')
MOST_LABELS = 32  # of an image
SMALL = 2**28  # bytes; reading and parsing a record takes longer than decoding a small image


class Tfds:
    """A TFDS split in a random-access format; a `small` one stays in memory once it is read.

    `label` is a feature or a function of the example; a list of labels is padded with -1 to
    `max_labels`. `change` is applied to the image's bytes.
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
        image = self.change(image) if self.change else image
        return {**example, 'image': image, 'label': label}

    def traits(self):
        info, split = self.data.dataset_info, self.data.split
        files = info.splits[split].file_instructions
        parts = [(os.path.basename(f.filename), f.skip, f.take, f.examples_in_shard) for f in files]
        names = {str(part.name): part.num_bytes for part in info.splits.values()}
        return [info.full_name, str(parts)], [str(sorted(names.items()))]

    def name(self, i):
        return f'{self.title}[{i}]'


def load(name, split, *, data_dir=None, image='image', label='label'):
    """(records, class names) of a split of a data set."""
    import tensorflow_datasets as tfds_lib

    builder = builder_of(name, data_dir)
    features = builder.info.features
    for key in (image, label):
        if key not in features:
            raise UserError(
                f'data set {name} has no feature {key!r}, but {", ".join(sorted(features))}'
            )
    one = getattr(features[label], 'feature', features[label])  # for a sequence of labels
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
    return found, tuple(one.names)


def builder_of(name, data_dir):
    """Builder of a data set; data sets of this package are prepared at their first use."""
    if name not in BUILDERS:
        return prepared(name, data_dir)
    import tensorflow_datasets as tfds_lib

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
    return builder


def vtab_task(name, split, data_dir=None):
    """(records, class names) of a split of a task of VTAB-1k."""
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
    return found, tuple(names)


def random_access(builder, split, image):
    """A split as a sequence of examples, with images that are not decoded."""
    import tensorflow_datasets as tfds_lib

    return builder.as_data_source(split, decoders={image: tfds_lib.decode.SkipDecoding()})


@contextlib.contextmanager
def explained(builder, name, split):
    """Raises UserError that says why a data set can't be opened, and what to do."""
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
        raise splits.missing(f'data set {name}', split, builder.info.splits) from e


def prepared(name, data_dir):
    """Builder of a data set that is prepared in data_dir, from the files alone."""
    import tensorflow_datasets as tfds_lib

    try:
        builder = tfds_lib.builder(name, data_dir=data_dir, try_gcs=False)
    except (tfds_lib.core.DatasetNotFoundError, ModuleNotFoundError, ValueError) as e:
        # ValueError: a name that TFDS does not allow, such as that of a missing folder
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
