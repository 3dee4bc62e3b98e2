"""Images with panoptic segments as COCO has them: a json, and a PNG of ids for each image.

The json is path/annotations/panoptic_NAME.json (or path/panoptic_NAME.json), the PNGs are in the
folder of the json's name beside it, the images in path/NAME or path/images/NAME. The split is NAME
without its year (panoptic_train2017: train); beside jsons of instances, panoptic_NAME without it.
The format is that of cocodataset.org, "Data format", panoptic segmentation.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vit_jax.data.readers import coco, facts, folders, ranges, splits, walk
from vit_jax.data.readers.record import Record
from vit_jax.io.text import brief

NAME = re.compile(r'panoptic_(.+)\.json')
SEGMENT = ('labels', 'crowd', 'ids')


class Panoptic:
    """Records of images with panoptic segments.

    They have `image` (bytes), `image_id` (int), and of the n segments of the image `ids` int64 [n],
    `labels` int32 [n] (indices of the class names; -1 for a category that is not listed), `crowd`
    bool [n] and, when a task asks for it, `segments`, the bytes of the PNG. `stuff` has the names
    of the classes that are no things.
    """

    label_fields = ('labels',)

    def __init__(
        self, root: str, paths: Sequence[str], pictures: Sequence[str],
        arrays: dict[str, np.ndarray], stuff: Sequence[str],
    ):  # fmt: skip
        self.root, self.paths, self.pictures = root, paths, pictures
        self.arrays, self.stuff = arrays, tuple(stuff)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Record:
        ends = self.arrays['ends']
        own = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
        fields = {name: self.arrays[name][own] for name in SEGMENT}
        fields['image'] = folders.file_bytes(self.paths[i])
        fields['image_id'] = int(self.arrays['image_ids'][i])
        return Record(fields, self, i)

    def field_names(self, i: int) -> list[str]:
        """The PNG."""
        return ['segments']

    def read_field(self, i: int, name: str) -> bytes:
        """Bytes of the PNG; raises UserError if it can't be read."""
        with ranges.reading(self.pictures[i]):
            return folders.file_bytes(self.pictures[i])

    def traits(self) -> facts.Traits:
        """See `facts`."""
        arrays = [self.arrays[name] for name in sorted(self.arrays)]
        order = [folders.relative(self.root, paths) for paths in (self.paths, self.pictures)]
        images, pictures = (folders.file_contents(paths) for paths in (self.paths, self.pictures))
        return facts.Traits(
            [*order, facts.digest(arrays)], images[0] + pictures[0], images[1] + pictures[1]
        )

    def name(self, i: int) -> str:
        """Path of the image of example i."""
        return self.paths[i]


def find(
    path: str, files: Iterable[str], inner: set[str], beside: bool
) -> dict[str, tuple[str, str, str]]:
    """{split: (json, folder of images, folder of PNGs)} of a folder with `files` and folders.

    `beside` says that it also has jsons of instances.
    """
    path, parts = path.rstrip('/'), {}
    places = [(path, files, inner)]
    if 'annotations' in inner:
        places.append((f'{path}/annotations', *walk.list_folder(f'{path}/annotations')[:2]))
    for place, names, folders_there in places:
        for name in sorted(names):
            stem = name.removesuffix('.json')
            if not (found := NAME.fullmatch(name)) or stem not in folders_there:
                continue
            images = f'{path}/{found[1]}' if found[1] in inner else f'{path}/images/{found[1]}'
            split = ('panoptic_' if beside else '') + re.sub(r'\d{4}$', '', found[1])
            parts.setdefault(split, (f'{place}/{name}', images, f'{place}/{stem}'))
    return parts


def read(
    path: str, parts: dict[str, tuple[str, str, str]], split: str
) -> tuple[Panoptic, tuple[str, ...]]:
    """(Panoptic, names of the categories) of a split."""
    file, images, pictures = parts[splits.parse(split)[0]]
    with coco.content_of(file, 'panoptic json') as content:
        names, files, arrays, classes, stuff = parse(content)
    found = Panoptic(
        path, [f'{images}/{name}' for name in names], [f'{pictures}/{name}' for name in files],
        arrays, stuff,
    )  # fmt: skip
    return found, classes


def parse(
    content: Any,
) -> tuple[list[str], list[str], dict[str, np.ndarray], tuple[str, ...], tuple[str, ...]]:
    """(images, PNGs, arrays by name, names of the categories, those of stuff) of COCO's json.

    Raises ValueError, TypeError, KeyError, AttributeError or OverflowError if it is another one.
    """
    categories = coco.by_number(content['categories'])
    order = sorted(categories)
    label_of = {number: label for label, number in enumerate(order)}
    own = {}
    for annotation in content['annotations']:
        if own.setdefault(int(annotation['image_id']), annotation) is not annotation:
            raise ValueError(f'two annotations are of the image {annotation["image_id"]}')
    names, files, image_ids, found = [], [], [], []
    for image in content['images']:
        annotation = own.pop(int(image['id']), None)
        if annotation is None:
            raise ValueError(f'image {image["id"]} has no annotation')
        for name in (image['file_name'], annotation['file_name']):
            if not coco.plain(name):
                raise ValueError(f'file_name {name!r} is not a path below its folder')
        names.append(image['file_name'])
        files.append(annotation['file_name'])
        image_ids.append(int(image['id']))
        found.append(annotation['segments_info'])
    if own:
        raise ValueError(f'an annotation is of the unknown image {brief(next(iter(own)))}')
    segments = [segment for one in found for segment in one]
    return names, files, {
        'image_ids': np.array(image_ids, np.int64),
        'ends': np.cumsum([len(one) for one in found], dtype=np.int64),
        'labels': np.array(
            [label_of.get(int(one['category_id']), -1) for one in segments], np.int32
        ),
        'crowd': np.array([bool(one.get('iscrowd', 0)) for one in segments], bool),
        'ids': np.array([int(one['id']) for one in segments], np.int64),
    }, tuple(str(categories[k]['name']) for k in order), tuple(
        str(categories[k]['name']) for k in order if not categories[k]['isthing']
    )  # fmt: skip
