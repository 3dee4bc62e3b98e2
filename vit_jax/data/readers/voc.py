"""Images of Pascal VOC: lists in ImageSets/, images in JPEGImages/, and what is annotated.

Objects are in Annotations/*.xml, classes by pixel in SegmentationClass/*.png, objects by pixel in
SegmentationObject/*.png. The splits are the lists of ImageSets/Segmentation, and those of
ImageSets/Main as main_train, main_val, ...; without the former, those of Main by their own names.
The format is that of the development kit (host.robots.ox.ac.uk/pascal/VOC/voc2012, section 8).
"""

import os
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from vit_jax.data.readers import facts, folders, ranges, shards, shares, splits, walk
from vit_jax.data.readers.pairs import CLASSES
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError
from vit_jax.io.text import brief

IMAGES, LISTS, OBJECTS = 'JPEGImages', 'ImageSets', 'Annotations'
MASKS = {'mask': 'SegmentationClass', 'segmentation': 'SegmentationObject'}  # {field: folder}
FIELDS = ('boxes', 'labels', 'crowd', 'ids')  # of the objects
SPLITS = (*splits.KNOWN, 'trainval')
NAMES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
    'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train',
    'tvmonitor',
)  # fmt: skip


class Voc:
    """Records of images, with what is annotated when a task asks for it.

    They have `image` (bytes) and, where the folders are, `mask` and `segmentation` (bytes of PNGs;
    of classes from 1 on, and of the numbers of objects), and of the n objects of the image `boxes`
    float32 [n, 4] (x, y, width, height in pixels), `labels` int32 [n] (-1 for a class that is not
    among the names), `crowd` bool [n], which are the difficult ones, and `ids`, 1 ... n.
    """

    label_fields = ()

    def __init__(
        self, root: str, images: Sequence[str], classes: Sequence[str], inner: Sequence[str]
    ):
        self.root, self.images, self.classes, self.inner = root, images, classes, inner

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Record:
        return Record({'image': folders.file_bytes(self.name(i))}, self, i)

    def field_names(self, i: int) -> list[str]:
        """What is annotated."""
        found = [name for name, folder in MASKS.items() if folder in self.inner]
        return found + (list(FIELDS) if OBJECTS in self.inner else [])

    def read_field(self, i: int, name: str) -> Any:
        """The bytes of a PNG, or an array of the objects; raises UserError."""
        folder, suffix = (MASKS[name], '.png') if name in MASKS else (OBJECTS, '.xml')
        file = f'{folder}/{os.path.splitext(self.images[i])[0]}{suffix}'
        with ranges.reading(f'{self.root}/{file}'):
            data = folders.file_bytes(f'{self.root}/{file}')
        return data if name in MASKS else objects(data, self.classes, file)[name]

    def traits(self) -> facts.Traits:
        """See `facts`."""
        contents, sample = [], []
        masks = ((folder, '.png') for folder in MASKS.values())
        kinds = [(IMAGES, None), (OBJECTS, '.xml'), *masks]
        for folder, suffix in kinds:
            if folder in self.inner:
                sizes, digest = folders.file_contents([
                    f'{self.root}/{folder}/{os.path.splitext(name)[0] + suffix if suffix else name}'
                    for name in self.images
                ])  # fmt: skip
                contents, sample = contents + sizes, sample + digest
        return facts.Traits(['\0'.join(self.images)], contents, sample)

    def name(self, i: int) -> str:
        """Path of the image of example i."""
        return f'{self.root}/{IMAGES}/{self.images[i]}'


def find(path: str, inner: set[str]) -> dict[str, str]:
    """{split: its list} of a folder with folders `inner`; {} if it is none of VOC."""
    if not {IMAGES, LISTS} <= inner:
        return {}
    top, parts = f'{path.rstrip("/")}/{LISTS}', {}
    kinds = walk.list_folder(top)[1]
    for kind in ('Segmentation', 'Main'):
        start = 'main_' if kind == 'Main' and 'Segmentation' in kinds else ''
        names = walk.list_folder(f'{top}/{kind}')[0] if kind in kinds else []
        found = [name for name in SPLITS if f'{name}.txt' in names]
        parts |= {f'{start}{name}': f'{top}/{kind}/{name}.txt' for name in found}
    return parts


def read(path: str, parts: dict[str, str], split: str) -> tuple[Voc, tuple[str, ...]]:
    """(Voc, names of classes) of a split, or of a share of one by a hash of the file names.

    The names are those in classes.txt, classes.json or labels.txt, else VOC's.
    """
    path, (part, low, high) = path.rstrip('/'), splits.parse(split)
    if part not in parts:
        raise splits.missing(path, part, parts)
    with ranges.reading(parts[part]):
        lines = folders.file_bytes(parts[part]).decode('utf-8', 'replace').splitlines()
    inner, known = walk.list_folder(path)[1], walk.list_folder(f'{path}/{IMAGES}')[0]
    files = {os.path.splitext(name)[0]: name for name in known}
    images = []
    for line in filter(str.strip, lines):
        stem = line.split()[0]
        if stem not in files:
            raise UserError(f'{parts[part]}: there is no {IMAGES}/{brief(stem)}')
        images.append(files[stem])
    images = shares.chosen(images, low, high)
    if not images:
        raise UserError(f'{parts[part]} names no images for split {split!r}')
    classes = tuple(shards.listed_names([path], CLASSES) or NAMES)
    return Voc(path, images, classes, inner), classes


def objects(data: bytes, classes: Sequence[str], file: str) -> dict[str, np.ndarray]:
    """The arrays of `FIELDS` of an annotation; raises UserError if it is none.

    Its pixels are counted from 1, and boxes include their last ones.
    """
    index = {name: label for label, name in enumerate(classes)}
    boxes, labels, crowd = [], [], []
    try:
        for one in parse(data).iterfind('object'):
            box = one.find('bndbox')
            x0, y0, x1, y1 = (float(box.findtext(k)) for k in ('xmin', 'ymin', 'xmax', 'ymax'))
            boxes.append((x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1))
            labels.append(index.get(one.findtext('name', '').strip(), -1))
            crowd.append(one.findtext('difficult', '0').strip() == '1')
    except (expat.ExpatError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f'{file} is no annotation of VOC: {brief(e)}') from e
    return {
        'boxes': np.array(boxes, np.float32).reshape(-1, 4), 'labels': np.array(labels, np.int32),
        'crowd': np.array(crowd, bool), 'ids': np.arange(1, len(boxes) + 1),
    }


def parse(data: bytes) -> ElementTree.Element:
    """Parses XML without a document type, and so without entities; raises ValueError."""
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()

    def refuse(*_):
        raise ValueError('it declares a document type')

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(data, True)
    return builder.close()
