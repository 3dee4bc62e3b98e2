"""Opens data sets of many formats by name, each as a sequence of records.

Folders of images, prepared records, tar shards (WebDataset), parquet files (Hugging Face), TFDS.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

from vit_jax.data import jft_like, scene_captions
from vit_jax.data.readers import (
    captions,
    coco,
    facts,
    folders,
    hf_metadata,
    pairs,
    panoptic,
    parquet,
    prepared,
    records,
    shards,
    splits,
    tars,
    tfds,
    voc,
    vtab,
)
from vit_jax.errors import UserError
from vit_jax.io.bounds import MayChange

MOST_CLASSES = 2**20  # without names


class Source(NamedTuple):
    """A data set that can be read at any index; picklable, reopened in worker processes.

    Attributes:
      records: sequence of raw fields by name, {'image': bytes, 'label': int or int32 [L], ...}; it
        has `name(i)` and may have `traits()`, see `readers.facts`.
      classes: names of the classes that `label` counts; empty without labels.
      labels: how the classes are matched with a model's, see `readers.names`.
      stuff: names of the classes that are no things, of panoptic segments.
    """

    records: Any
    classes: tuple[str, ...]
    labels: str = 'by_name'
    stuff: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def name(self, i: int) -> str:
        """Name of example i for messages: a path, or data set, split and index."""
        return self.records.name(i)


class Slice:
    """Examples `start` to `stop` of other records."""

    def __init__(self, records: Any, start: int, stop: int) -> None:
        self.records, self.start, self.stop = records, start, stop
        self.max_labels = getattr(records, 'max_labels', None)
        self.label_fields = getattr(records, 'label_fields', ('label',))

    def __len__(self) -> int:
        return self.stop - self.start

    def shift(self, i: int) -> int:
        """Index of example i in the other records; raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f'no example {i} among {len(self)}')
        return int(i) + self.start

    def __getitem__(self, i: int) -> Any:
        return self.records[self.shift(i)]

    def traits(self) -> facts.Traits:
        """See `readers.facts`."""
        own = facts.traits(self.records)
        return own._replace(order=[str((self.start, self.stop)), *own.order])

    def name(self, i: int) -> str:
        """Name of example i."""
        return self.records.name(self.shift(i))


def load(
    *,
    name: str,
    split: str = 'train',
    data_dir: Annotated[str | None, MayChange()] = None,
    image: str | None = 'image',
    label: str | None = 'label',
    labels: Literal['by_name', 'by_number'] = 'by_name',
) -> Source:
    """Opens a data set, whose format follows from its name and its files:

    - a folder with manifest.json: records, as written by `python -m vit_jax.data.prepare`
    - tar shards (WebDataset): `x-{0000..0146}.tar`, `x-*.tar`, or a folder that holds them, also
      in train/ and val/
    - parquet files, named likewise or in data/; arrow files of Hugging Face's `save_to_disk`
    - a folder with captions.jsonl, or a metadata.jsonl with captions, see `readers.captions`
    - a folder with images/ beside masks/, the masks with the names of their images, see
      `readers.pairs`
    - a folder with a json of COCO beside its images, see `readers.coco`; with a panoptic one, see
      `readers.panoptic`
    - a folder of Pascal VOC, JPEGImages/ beside ImageSets/, see `readers.voc`
    - any other folder: images in class/, or in train/class/ and val/class/
    - `jft_like:EXAMPLESxCLASSES[@SIZE][,KEY=VALUE]...`: synthetic images, drawn as they are read,
      see data/jft_like.py
    - `scene_captions:SHARE`: captions of fashion_scenes, see data/scene_captions.py
    - `vtab:TASK`: a task of VTAB or VTAB-1k, from TFDS, see data/readers/vtab.py
    - any other name: a TFDS data set that is prepared in `data_dir`

    All but TFDS data sets may be at an address (gs://, https://), a folder of images at gs:// only.
    Classes whose names are numbers are sorted as numbers.

    Args:
      name: path, address, pattern of shards or name of the data set.
      split: split such as 'train', or a share of one in percent, such as 'train[:90%]': by a hash
        of the file name in a folder of images, by position elsewhere. A pattern of shards has the
        split 'train' alone; TFDS data sets take all splits that TFDS knows.
      data_dir: folder where TFDS keeps prepared data sets. None: its default.
      image: TFDS feature, parquet column or file extension in a tar that holds the image. None:
        the examples have no image, as in a TFDS data set or parquet files of texts.
      label: TFDS feature, parquet column, or file extension or json field in a tar that holds the
        label. None: the examples have no label, and the data set has no classes. A TFDS feature of
        objects, such as objects/label, names the classes of what is annotated.
      labels: how classes are matched with those of a model or of other data sets: by their names
        or by their numbers.
    """
    found = open_source(name, split, data_dir, image, label)
    return Source(found.records, found.classes, labels, found.stuff)


def open_source(
    name: str, split: str, data_dir: str | None, image: str | None, label: str | None
) -> Source:
    """Same as `load`, with labels that are matched by name."""
    address, kind = os.path.expanduser(name), kind_of(name)
    data_dir = expand_home(data_dir)
    if kind == 'tfds':
        return Source(*tfds.load(name, split, data_dir=data_dir, image=image, label=label))
    if kind == 'vtab':
        return Source(*tfds.load_vtab(name, split, data_dir))
    part, _, _ = splits.parse(split)
    if kind == 'drawn':
        return take_share(*jft_like.load(name, part), split)
    if kind == 'scenes':
        return take_share(*scene_captions.load(name, part, data_dir), split)
    if kind == 'pattern':
        return open_shards({'train': shards.expand(address)}, address, split, image, label)
    files, inner = shards.list_folder(address)
    if {records.MANIFEST, records.JOURNAL} & files:
        found = prepared.Prepared(address, part)
        return take_share(found, found.classes, split)
    parts = shards.find_shards(address, files, inner)
    if parts:
        return open_shards(parts, address, split, image, label)
    with explain_address(address):
        if parts := captions.find(address, files, inner):
            return take_share(*captions.read(address, parts, split, label), split)
        parts = coco.find(address, files, inner)
        segments = panoptic.find(address, files, inner, beside=bool(parts))
        if part in segments:
            return take_share(*panoptic.read(address, segments, split), split)
        if parts or segments:
            return take_share(*coco.read(address, parts | segments, split), split)
        if parts := voc.find(address, inner):
            return Source(*voc.read(address, parts, split))
        if parts := pairs.find(address, inner):
            return Source(*pairs.read(address, parts, split))
        return Source(*folders.read(address, split))


def kind_of(name: str) -> str:
    """Kind of a data set's name: drawn, scenes, vtab, pattern (of shards), place or tfds."""
    kinds = (('jft_like:', 'drawn'), ('scene_captions:', 'scenes'), ('vtab:', 'vtab'))
    for start, kind in kinds:
        if name.startswith(start):
            return kind
    address = os.path.expanduser(name)
    exists = '://' not in name and os.path.exists(address)
    if not exists and ('*' in name or '{' in name) or address.endswith(shards.SHARDS) and not (
        os.path.isdir(address)
    ):
        return 'pattern'
    place = name.startswith(('/', '.', '~')) or '://' in name or (
        os.path.isdir(address) and not is_workdir(address)
    )
    return 'place' if place else 'tfds'


def is_workdir(folder: str) -> bool:
    """Whether a folder holds a run and nothing else, as `--workdir cifar10` makes it."""
    if not os.path.exists(os.path.join(folder, '.lock')):
        return False
    with os.scandir(folder) as entries:
        inner = {entry.name for entry in entries if entry.is_dir()}
    return inner <= {'checkpoints', 'tensorboard', 'compiled', 'profile', 'logs', 'tokenizer'}


def expand_home(folder: str | None) -> str | None:
    """Expands ~ in a folder's path."""
    return None if folder is None else os.path.expanduser(folder)


@contextlib.contextmanager
def explain_address(address: str) -> Iterator[None]:
    """Turns the error of an address that epath can't open into UserError."""
    try:
        yield
    except KeyError:
        raise UserError(
            f'{address} has no {records.MANIFEST}, and no *.tar or *.parquet that its server '
            'lists; name shards as ADDRESS/x-{000..146}.tar'
        ) from None


def splits_of(name: str, data_dir: str | None = None) -> tuple[str, ...]:
    """The splits of a data set, from the names of its files; `name` and `data_dir` as in `load`."""
    address, kind = os.path.expanduser(name), kind_of(name)
    if kind in ('drawn', 'scenes'):
        return (jft_like if kind == 'drawn' else scene_captions).SPLITS
    if kind == 'vtab':
        return vtab.SPLITS
    if kind == 'pattern':
        return ('train',)
    if kind == 'tfds':
        return tuple(map(str, tfds.builder_of(name, expand_home(data_dir)).info.splits))
    files, inner = shards.list_folder(address)
    if {records.MANIFEST, records.JOURNAL} & files:
        return tuple(records.read_manifest(address)['splits'])
    parts = shards.find_shards(address, files, inner)
    with explain_address(address):
        parts = parts or captions.find(address, files, inner)
        if not parts:
            parts = coco.find(address, files, inner)
            parts |= panoptic.find(address, files, inner, beside=bool(parts))
        parts = parts or voc.find(address, inner) or pairs.find(address, inner)
        return tuple(parts or folders.split_folders(address.rstrip('/')) or ('train',))


def held_out(name: str) -> tuple[str, dict[str, str]]:
    """(split to train on, {evaluation: split}) of a data set, see `splits.held_out`.

    Recipes call this. A data set that is not on this machine is assumed to have train and test.
    """
    try:
        known = splits_of(name)
    except UserError:  # raised when it is opened; a plan or a rehearsal needs no data
        known = ('train', 'test')
    return splits.held_out(known)


def take_share(found: Any, classes: Iterable[str], split: str) -> Source:
    """Makes a Source of records, or of a share of them by position."""
    _, low, high = splits.parse(split)
    stuff = getattr(found, 'stuff', ())
    if (low, high) != (0, 100):
        start, stop = (round(len(found) * percent / 100) for percent in (low, high))
        found = Slice(found, start, stop)
    if not len(found):
        raise UserError(f'split {split!r} has no examples')
    return Source(found, tuple(classes), stuff=stuff)


def open_shards(
    parts: dict[str, list[str]], address: str, split: str, image: str | None, label: str | None
) -> Source:
    """Opens a split of tar, parquet or arrow files; `parts` is {split: files}."""
    part, _, _ = splits.parse(split)
    if part not in parts:
        raise splits.missing(address, part, sorted(parts))
    files = parts[part]
    kinds = {os.path.splitext(file.partition('?')[0])[1] for file in files}
    if len(kinds) != 1 or not kinds <= set(shards.SHARDS):
        kinds = ', '.join(sorted(kinds))
        raise UserError(f'{address}: files are {kinds}, not one of {", ".join(shards.SHARDS)}')
    kind, read = (tars, tars.Tars) if kinds == {'.tar'} else (hf_metadata, parquet.Table)
    if image is None and kind is tars:
        raise UserError(f'{address}: examples of tar shards need an image; source.image names it')
    found = read(files, image=image, label=label)
    if label is None:
        return take_share(found, (), split)
    places = [os.path.dirname(files[0])]
    if os.path.basename(places[0]) in (part, 'data'):
        places.append(os.path.dirname(places[0]))
    classes = kind.class_names(found, places, label)
    if classes is None:
        highest = found.labels.max(initial=-1)
        if part != 'train' and 'train' in parts:  # the classes are those of train, too
            others = read(parts['train'], image=image, label=label)
            highest = max(highest, others.labels.max(initial=-1))
        if highest >= MOST_CLASSES:
            raise UserError(f'{address} has a label {highest}, and no list of class names')
        classes = map(str, range(highest + 1))
    return take_share(found, classes, split)
