"""Images with masks of the same names: path/images/** beside path/masks/**, or in path/train/...

A mask has the path of its image below the folder, but for the suffix. The folders of splits are
above (path/train/images) or below (path/images/train). Masks may be in annotations/ and splits
called training, as in ADE20K's ADEChallengeData2016. Names of the classes are in path/classes.txt
or labels.txt, one a line, or classes.json, a list.
"""

import os
from collections.abc import Sequence

from vit_jax.data.readers import facts, folders, ranges, shards, shares, splits, walk
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError

IMAGES, MASKS = 'images', ('masks', 'annotations')
SPLITS = {**{name: name for name in splits.KNOWN}, 'training': 'train'}  # {folder: split}
CLASSES = ('classes.txt', 'classes.json', 'labels.txt')


class Pairs:
    """Records of image files and their masks: `image`, and `mask` when a task asks for it."""

    label_fields = ()

    def __init__(self, root: str, images: Sequence[str], masks: Sequence[str]):
        self.root, self.images, self.masks = root, images, masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Record:
        return Record({'image': folders.file_bytes(self.images[i])}, self, i)

    def field_names(self, i: int) -> list[str]:
        """The mask."""
        return ['mask']

    def read_field(self, i: int, name: str) -> bytes:
        """Bytes of the mask; raises UserError if it can't be read."""
        with ranges.reading(self.masks[i]):
            return folders.file_bytes(self.masks[i])

    def traits(self) -> facts.Traits:
        """See `facts`."""
        order = [folders.relative(self.root, paths) for paths in (self.images, self.masks)]
        images, masks = (folders.file_contents(paths) for paths in (self.images, self.masks))
        return facts.Traits(order, images[0] + masks[0], images[1] + masks[1])

    def name(self, i: int) -> str:
        """Path of the image of example i."""
        return self.images[i]


def find(path: str, inner: set[str]) -> dict[str, tuple[str, str]]:
    """{split: (folder of images, folder of masks)} of a folder with folders `inner`; {} if none."""
    path = path.rstrip('/')
    if pair := beside(path, inner):
        below = set(SPLITS)
        below = below.intersection(*(walk.list_folder(folder)[1] for folder in pair))
        if below:
            return {SPLITS[part]: tuple(f'{one}/{part}' for one in pair) for part in sorted(below)}
        return {'train': pair}
    parts = {}
    for part in sorted(set(SPLITS) & inner):
        if pair := beside(f'{path}/{part}', set(walk.list_folder(f'{path}/{part}')[1])):
            parts[SPLITS[part]] = pair
    return parts


def beside(path: str, inner: set[str]) -> tuple[str, str] | None:
    """(folder of images, folder of masks) among the folders `inner` of a path, or None."""
    masks = [name for name in MASKS if name in inner]
    return (f'{path}/{IMAGES}', f'{path}/{masks[0]}') if IMAGES in inner and masks else None


def read(
    path: str, parts: dict[str, tuple[str, str]], split: str
) -> tuple[Pairs, tuple[str, ...]]:
    """(Pairs, names of classes) of a split, or of a share of one by a hash of the file names."""
    part, low, high = splits.parse(split)
    if part not in parts:
        raise splits.missing(path, part, parts)
    top, skipped = parts[part], walk.Skipped()
    images, masks = (by_stem(folder, skipped) for folder in top)
    for folder, found in zip(top, (images, masks), strict=True):
        for stem, files in found.items():
            if len(files) > 1:
                raise UserError(f'{folder}/{stem} stands for {len(files)} files: {files[0]} ...')
    for stem in [stem for stem in images if stem not in masks]:
        skipped.add('images without a mask', images.pop(stem)[0])
    for stem in [stem for stem in masks if stem not in images]:
        skipped.add('masks without an image', masks[stem][0])
    stems = shares.chosen(list(images), low, high)
    if not stems:
        raise UserError(f'no images with masks in {top[0]} and {top[1]} for split {split!r}')
    skipped.report(path)
    found = Pairs(path, [images[stem][0] for stem in stems], [masks[stem][0] for stem in stems])
    return found, tuple(shards.listed_names([path], CLASSES) or ())


def by_stem(folder: str, skipped: walk.Skipped) -> dict[str, list[str]]:
    """{path below the folder without suffix: files of this name} of the images in a folder."""
    root, _, name = folder.rpartition('/')
    seen = set() if '://' in folder else {walk.identity(folder)}
    found = {}
    for file in walk.walk(root, name, skipped, seen):
        stem = os.path.splitext(file.removeprefix(f'{name}/'))[0]
        found.setdefault(stem, []).append(f'{root}/{file}')
    return found
