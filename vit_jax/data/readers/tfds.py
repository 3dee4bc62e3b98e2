"""Opens prepared data sets of TFDS by name, those of VTAB among them."""

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vit_jax.data.readers import facts, splits, tfrecord, vtab
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError

BUILDERS = ('digits', 'emoji', 'fashion_mnist_debian', 'fashion_scenes')
MOST_LABELS = 32  # of an image
SMALL = 2**28  # bytes; reading and parsing a record takes longer than decoding a small image


class Tfds:
    """Records of a TFDS split in a random-access format: `image`, `label` and all features by name.

    Features of features are named with a slash, objects/bbox.

    Args:
      data: sequence of examples, from `random_access`.
      title: name of the data set for messages.
      image: feature of the image; None: there is none.
      label: feature of the label, or function of the example; None: there is none.
      small: the records stay in memory once they are read.
      max_labels: most labels of an image, to which a list of them is padded with -1. None: one.
      change: function applied to the image's bytes.
    """

    label_fields = ('label',)

    def __init__(
        self,
        data: Any,
        title: str,
        image: str | None,
        label: str | Callable[[Mapping], int] | None,
        small: bool,
        max_labels: int | None = None,
        change: Callable[[bytes], bytes] | None = None,
    ):
        self.data, self.title, self.image, self.label = data, title, image, label
        self.max_labels, self.change = max_labels, change
        self.cache = {} if small else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Record:
        if self.cache is None:
            return self.read(i)
        if i not in self.cache:
            self.cache[i] = self.read(i)
        return self.cache[i]

    def read(self, i: int) -> Record:
        """Reads example i from its file."""
        example = self.data[i]
        fields = flat(example)
        if self.image is not None:
            image = example[self.image]
            fields['image'] = self.change(image) if self.change else image
        if self.label is None:
            return Record(fields)
        label = self.label(example) if callable(self.label) else example[self.label]
        if self.max_labels is not None:
            if len(label) > self.max_labels:
                raise UserError(f'{self.name(i)} has {len(label)} labels, above {self.max_labels}')
            label = np.pad(np.asarray(label, np.int32), (0, self.max_labels - len(label)),
                           constant_values=-1)  # fmt: skip
        return Record(fields | {'label': label})

    def traits(self) -> facts.Traits:
        """See `facts`."""
        info, split = self.data.dataset_info, self.data.split
        files = info.splits[split].file_instructions
        parts = [(os.path.basename(f.filename), f.skip, f.take, f.examples_in_shard) for f in files]
        names = {str(part.name): part.num_bytes for part in info.splits.values()}
        local = not any('://' in str(file.filename) for file in files)
        sample = [facts.sample_digest(self.read_image, len(self))] if local else []
        return facts.Traits([info.full_name, str(parts)], [str(sorted(names.items()))], sample)

    def read_image(self, i: int) -> bytes:
        """Bytes of the image of example i, as they are in its file; of no image, all it has."""
        example = self.data[i]
        return repr(sorted(example.items())).encode() if self.image is None else example[self.image]

    def name(self, i: int) -> str:
        """Data set, split and index of example i."""
        return f'{self.title}[{i}]'


def flat(example: Mapping[str, Any], start: str = '') -> dict[str, Any]:
    """Features by name, those of features with a slash."""
    found = {}
    for name, value in example.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f'{start}{name}/') if inner else {f'{start}{name}': value}
    return found


def load(
    name: str,
    split: str,
    *,
    data_dir: str | None = None,
    image: str | None = 'image',
    label: str | None = 'label',
) -> tuple[Tfds | tfrecord.TfRecords, tuple[str, ...]]:
    """(records, class names) of a split of a data set; without a `label` there are no classes.

    A label of objects, such as objects/label, names the classes; records then have no `label`.
    """
    import tensorflow_datasets as tfds_lib

    builder = builder_of(name, data_dir)
    features, labels = builder.info.features, ('label',)
    for key in (image, label):
        if key is not None and feature_of(features, key) is None:
            hint = '; source.label=None reads no labels' if key == label else ''
            raise UserError(
                f'data set {name} has no feature {key!r}, but {", ".join(sorted(features))}{hint}'
            )
    classes, most = (), None
    labels = labels if label is not None else ()
    if label is not None:
        whole = feature_of(features, label)
        one = getattr(whole, 'feature', whole)  # for a sequence of labels
        if getattr(one, 'names', None) is None:
            raise UserError(f'feature {label!r} of data set {name} is not a class label')
        classes, most = tuple(one.names), None if one is whole else MOST_LABELS
        if label not in features:
            labels, label, most = (label,), None, None
    tfrecords = builder.info.available_file_formats() == {tfds_lib.core.FileFormat.TFRECORD}
    with explain_errors(builder, name, split):
        if tfrecords and most is None and image is not None:
            found = tfrecord.of_builder(builder, split, image=image, label=label)
        else:
            data = random_access(builder, split, image)
            small = builder.info.dataset_size < SMALL
            found = Tfds(data, f'{name}/{split}', image, label, small, most)
    found.label_fields = labels
    return found, classes


def feature_of(features: Any, path: str) -> Any:
    """The feature of a name, or of features, as in objects/label; None if there is none.

    `features` is a tfds.features.FeaturesDict.
    """
    if path in features:
        return features[path]
    name, slash, rest = path.partition('/')
    inner = features[name] if slash and name in features else None
    inner = getattr(inner, 'feature', inner)  # of a sequence
    return feature_of(inner, rest) if hasattr(inner, 'items') else None


def builder_of(name: str, data_dir: str | None) -> Any:
    """Builder of a data set; data sets of this package are prepared at their first use."""
    if name not in BUILDERS:
        return prepared_builder(name, data_dir)
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


def load_vtab(
    name: str, split: str, data_dir: str | None = None
) -> tuple[Tfds, tuple[str, ...]]:
    """(records, class names) of a split of a task of VTAB."""
    task = vtab.task(name)
    builder = prepared_builder(task.dataset, data_dir)
    sizes = {part: info.num_examples for part, info in builder.info.splits.items()}
    part = vtab.split_of(task, split, sizes)
    with explain_errors(builder, task.dataset, part):
        data = random_access(builder, part, 'image')
    if isinstance(task.label, str):
        names = builder.info.features[task.label].names
    else:
        names = map(str, range(task.classes))
    change = vtab.brighten if task.bright else None
    small = builder.info.dataset_size < SMALL or split in vtab.THOUSAND
    found = Tfds(data, f'{name}/{split}', 'image', task.label, small, change=change)
    return found, tuple(names)


def random_access(builder: Any, split: str, image: str | None) -> Any:
    """A split as a sequence of examples; all images are their encoded bytes."""
    import tensorflow_datasets as tfds_lib

    images = [k for k, f in builder.info.features.items() if isinstance(f, tfds_lib.features.Image)]
    decoders = {name: tfds_lib.decode.SkipDecoding() for name in {image, *images} - {None}}
    return builder.as_data_source(split, decoders=decoders)


@contextlib.contextmanager
def explain_errors(builder: Any, name: str, split: str) -> Iterator[None]:
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


def prepared_builder(name: str, data_dir: str | None) -> Any:
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
