"""Images with boxes as COCO has them: a json of annotations beside a folder of images.

The json is path/annotations/instances_NAME.json (or path/NAME.json) and the images are in path/NAME
or path/images/NAME, the split being NAME without its year (train2017: train); or the json is
path/SPLIT/_annotations.coco.json, with the images beside it. The format is that of cocodataset.org,
"Data format", object detection.
"""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vit_jax.data.readers import facts, folders, ranges, splits, walk
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError
from vit_jax.io import addresses, storage
from vit_jax.io.text import brief

MOST_JSON = 2**32  # bytes
ANNOTATION = ('boxes', 'labels', 'crowd', 'areas', 'ids')
BESIDE = '_annotations.coco.json'
NAME = re.compile(r'(?:instances_)?(?!panoptic_)(.+)\.json')  # see `readers.panoptic`


class Coco:
    """Records of images with boxes.

    They have `image` (bytes), `image_id` (int), if the json has it `annotated_shape` (height,
    width), and of the n annotations of the image `boxes` float32 [n, 4] (x, y, width, height in
    pixels), `labels` int32 [n] (indices of the class names; -1 for a category that is not listed),
    `crowd` bool [n], `areas` float32 [n], `ids` int64 [n] and, when a task asks for it,
    `segmentation`, a list of what the json has: polygons or run lengths.
    """

    label_fields = ('labels',)

    def __init__(self, root: str, paths: Sequence[str], arrays: dict[str, np.ndarray]):
        self.root, self.paths, self.arrays = root, paths, arrays

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Record:
        own = self.annotations(i)
        fields = {name: self.arrays[name][own] for name in ANNOTATION}
        fields['image'] = folders.file_bytes(self.paths[i])
        fields['image_id'] = int(self.arrays['image_ids'][i])
        if min(shape := tuple(self.arrays['shapes'][i].tolist())) > 0:
            fields['annotated_shape'] = shape
        return Record(fields, self, i)

    def annotations(self, i: int) -> slice:
        """The annotations of example i."""
        ends = self.arrays['ends']
        return slice(int(ends[i - 1]) if i else 0, int(ends[i]))

    def field_names(self, i: int) -> list[str]:
        """The segmentation."""
        return ['segmentation']

    def read_field(self, i: int, name: str) -> list:
        """The segmentation of each annotation."""
        own, ends = self.annotations(i), self.arrays['text_ends']
        bounds = [int(ends[own.start - 1]) if own.start else 0, *ends[own].tolist()]
        text = self.arrays['text']
        return [json.loads(text[a:b].tobytes()) for a, b in itertools.pairwise(bounds)]

    def traits(self) -> facts.Traits:
        """See `facts`."""
        arrays = [self.arrays[name] for name in sorted(self.arrays)]
        order = [folders.relative(self.root, self.paths), facts.digest(arrays)]
        return facts.Traits(order, *folders.file_contents(self.paths))

    def name(self, i: int) -> str:
        """Path of the image of example i."""
        return self.paths[i]


def find(path: str, files: Iterable[str], inner: set[str]) -> dict[str, tuple[str, str]]:
    """{split: (json, folder of its images)} of a folder with `files` and folders; {} if none."""
    path, parts = path.rstrip('/'), {}
    for part in sorted(set(splits.KNOWN) & inner):
        if BESIDE in walk.list_folder(f'{path}/{part}')[0]:
            parts[part] = f'{path}/{part}/{BESIDE}', f'{path}/{part}'
    jsons = [f'{path}/{name}' for name in sorted(files) if name.endswith('.json')]
    if 'annotations' in inner:
        names = walk.list_folder(f'{path}/annotations')[0]
        jsons += [f'{path}/annotations/{name}' for name in names if name.endswith('.json')]
    images = set(walk.list_folder(f'{path}/images')[1]) if jsons and 'images' in inner else set()
    for file in jsons:
        if not (named := NAME.fullmatch(file.rpartition('/')[2])):
            continue
        stem = named[1]
        folder = f'{path}/{stem}' if stem in inner else f'{path}/images/{stem}'
        if stem in inner | images and holds_images(folder):
            parts.setdefault(re.sub(r'\d{4}$', '', stem), (file, folder))
    return parts


def holds_images(folder: str) -> bool:
    """Whether a folder has images, and no folders in which classes could be."""
    files, inner, _ = walk.list_folder(folder)
    return not walk.visible(inner) and any(name.lower().endswith(walk.SUFFIXES) for name in files)


def read(path: str, parts: dict[str, tuple[str, str]], split: str) -> tuple[Coco, tuple[str, ...]]:
    """(Coco, names of the categories) of a split."""
    part, _, _ = splits.parse(split)
    if part not in parts:
        raise splits.missing(path, part, parts)
    file, folder = parts[part]
    with content_of(file, 'json') as content:
        names, arrays, classes = parse(content)
    return Coco(path, [f'{folder}/{name}' for name in names], arrays), classes


@contextlib.contextmanager
def content_of(file: str, kind: str) -> Iterator[Any]:
    """Yields the content of a json; raises UserError where it can't be read, or what follows fails.

    `kind` says in messages what of COCO it is to be.
    """
    with ranges.reading(file):
        if '://' in file:
            fs, place = addresses.backend(file)
            if (fs.info(place).get('size') or 0) > MOST_JSON:
                raise UserError(f'{file} has more than {MOST_JSON:,} bytes')
            content = fs.cat_file(place)
        else:
            content = storage.read_local(file, MOST_JSON)
    try:
        yield json.loads(content)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, OverflowError) as e:
        raise UserError(f'{file} is not a valid {kind} of COCO: {brief(reason(e))}') from e


def reason(error: Exception) -> str:
    """Says what is wrong, in words also for a missing key."""
    return f'no field {error}' if isinstance(error, KeyError) else str(error)


def parse(content: Any) -> tuple[list[str], dict[str, np.ndarray], tuple[str, ...]]:
    """(file names, arrays by name, names of the categories) of COCO's json.

    Raises ValueError, TypeError, KeyError, AttributeError or OverflowError if it is another one.
    """
    categories = {k: str(one['name']) for k, one in by_number(content['categories']).items()}
    label_of = {number: label for label, number in enumerate(sorted(categories))}
    names, index, shapes = [], {}, []
    for image in content['images']:
        if not plain(image['file_name']):
            raise ValueError(f'file_name {image["file_name"]!r} is not a path below its folder')
        if index.setdefault(int(image['id']), len(names)) != len(names):
            raise ValueError(f'two images have the id {image["id"]}')
        names.append(image['file_name'])
        shapes.append([int(image.get(side) or 0) for side in ('height', 'width')])
    own = [[] for _ in names]
    for annotation in content['annotations']:
        k = index.get(int(annotation['image_id']))
        if k is None:
            raise ValueError(f'annotation {annotation["id"]} has an unknown image')
        own[k].append(annotation)
    found = [annotation for one in own for annotation in one]
    texts = [json.dumps(one.get('segmentation')).encode() for one in found]
    boxes = np.array([one['bbox'] for one in found], np.float32).reshape(-1, 4)
    if len(boxes) != len(found):
        raise ValueError('a bbox is not four numbers')
    return names, {
        'image_ids': np.array(list(index), np.int64),
        'shapes': np.array(shapes, np.int64).reshape(-1, 2),
        'ends': np.cumsum([len(one) for one in own], dtype=np.int64),
        'boxes': boxes,
        'labels': np.array(
            [label_of.get(int(one['category_id']), -1) for one in found], np.int32
        ),
        'crowd': np.array([bool(one.get('iscrowd', 0)) for one in found], bool),
        'areas': np.array(
            [one.get('area', box[2] * box[3]) for one, box in zip(found, boxes, strict=True)],
            np.float32,
        ),
        'ids': np.array([int(one['id']) for one in found], np.int64),
        'text': np.frombuffer(b''.join(texts), np.uint8),
        'text_ends': np.cumsum([len(text) for text in texts], dtype=np.int64),
    }, tuple(categories[number] for number in sorted(categories))


def by_number(categories: Iterable[dict]) -> dict[int, dict]:
    """{id: category}; raises ValueError if two have the same id."""
    found = {}
    for one in categories:
        if found.setdefault(int(one['id']), one) is not one:
            raise ValueError(f'two categories have the id {one["id"]}')
    return found


def plain(name: Any) -> bool:
    """Whether a file name stays within its folder."""
    return isinstance(name, str) and bool(name) and not (
        os.path.isabs(name) or '://' in name or '..' in name.split('/') or '\0' in name
    )
