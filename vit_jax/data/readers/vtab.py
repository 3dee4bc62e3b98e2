"""VTAB (arXiv:1910.04867): 19 tasks with 1,000 training images each or all of them, from TFDS.

`data.source.name='vtab:TASK'` has the splits train800, val200, train800val200 (the 1,000 images of
VTAB-1k), train and val (all images, split as in the full VTAB), and test, which is that of both.
Images and labels are chosen as in the benchmark's own code (github.com,
google-research/task_adaptation). Prepare once: tfds build NAME --file_format=array_record.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vit_jax.data.readers import splits
from vit_jax.errors import UserError

THOUSAND = ('train800', 'val200', 'train800val200')
SPLITS = (*THOUSAND, 'train', 'val', 'test')
CLEVR = np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0])  # distances between classes
KITTI = np.array([-100.0, 8.0, 20.0, 999.0])  # metres; beyond the last: no vehicle


class Task(NamedTuple):
    """A task: where its images are, and what to predict."""

    group: str
    dataset: str  # TFDS
    classes: int
    train: int  # examples of the split train
    val: tuple[str, int]  # the TFDS split that has val, and the percent of it where that begins
    test: str  # val ends where it begins
    label: str | Callable = 'label'  # a feature, or a function of the example
    bright: bool = False  # pixels are 0 and 1


def last_below(value: float, thresholds: np.ndarray) -> int:
    """Index of the last threshold below a value."""
    return int(np.flatnonzero(thresholds < value)[-1])


def clevr_count(example: Mapping[str, Any]) -> int:
    """Number of objects, which is 3 to 10."""
    return len(example['objects']['size']) - 3


def clevr_distance(example: Mapping[str, Any]) -> int:
    """Distance of the closest object, in 6 classes."""
    return last_below(np.min(np.asarray(example['objects']['pixel_coords'])[:, 2]), CLEVR)


def kitti_distance(example: Mapping[str, Any]) -> int:
    """Distance of the closest car, van or truck, in 3 classes, and one for no vehicle."""
    vehicles = np.asarray(example['objects']['type']) < 3
    depths = np.asarray(example['objects']['location']).reshape(-1, 3)[vehicles, 2]
    return last_below(np.min(depths, initial=1000.0), KITTI)


def dsprites_location(example: Mapping[str, Any]) -> int:
    """Horizontal position: 32 positions in 16 classes."""
    return int(example['label_x_position']) // 2


def dsprites_orientation(example: Mapping[str, Any]) -> int:
    """40 angles in 16 classes."""
    return int(example['label_orientation'] / 2.5)


OWN, TENTH = ('validation', 0), ('train', 90)  # TFDS's own validation split; a tenth of train
SIXTY = ('train', 60), 'train[80%:]'
SPRITES = ('train', 80), 'train[90%:]'
NORB = ('test', 0), 'test[50%:]'
RETINOPATHY = 'diabetic_retinopathy_detection/btgraham-300'
# Tasks whose labels a flip or a crop changes (arXiv:1912.11370 appendix F).
NOT_FLIPPED = ('dsprites_orientation', 'dsprites_location', 'norb_azimuth')
NOT_CROPPED = ('clevr_count', 'clevr_distance', 'dmlab', 'kitti_distance', 'dsprites_location')
TASKS = {
    'caltech101': Task('natural', 'caltech101', 102, 2_754, TENTH, 'test'),
    'cifar100': Task('natural', 'cifar100', 100, 45_000, TENTH, 'test'),
    'dtd': Task('natural', 'dtd', 47, 1_880, OWN, 'test'),
    'flowers102': Task('natural', 'oxford_flowers102', 102, 1_020, OWN, 'test'),
    'pets': Task('natural', 'oxford_iiit_pet', 37, 2_944, ('train', 80), 'test'),
    'sun397': Task('natural', 'sun397/tfds', 397, 76_128, OWN, 'test'),
    'svhn': Task('natural', 'svhn_cropped', 10, 65_931, TENTH, 'test'),
    'camelyon': Task('specialized', 'patch_camelyon', 2, 262_144, OWN, 'test'),
    'eurosat': Task('specialized', 'eurosat/rgb', 10, 16_200, *SIXTY),
    'resisc45': Task('specialized', 'resisc45', 45, 18_900, *SIXTY),
    'retinopathy': Task('specialized', RETINOPATHY, 5, 35_126, OWN, 'test'),
    'clevr_count': Task('structured', 'clevr', 8, 63_000, TENTH, 'validation', clevr_count),
    'clevr_distance': Task('structured', 'clevr', 6, 63_000, TENTH, 'validation', clevr_distance),
    'dmlab': Task('structured', 'dmlab', 6, 65_550, OWN, 'test'),
    'dsprites_location': Task(
        'structured', 'dsprites', 16, 589_824, *SPRITES, dsprites_location, bright=True
    ),
    'dsprites_orientation': Task(
        'structured', 'dsprites', 16, 589_824, *SPRITES, dsprites_orientation, bright=True
    ),
    'kitti_distance': Task('structured', 'kitti', 4, 6_347, OWN, 'test', kitti_distance),
    'norb_azimuth': Task('structured', 'smallnorb', 18, 24_300, *NORB, 'label_azimuth'),
    'norb_elevation': Task('structured', 'smallnorb', 9, 24_300, *NORB, 'label_elevation'),
}


def task(name: str) -> Task:
    """The task of a name 'vtab:NAME'; raises UserError for an unknown one."""
    found = TASKS.get(name.removeprefix('vtab:'))
    if found is None:
        raise UserError(f'no task {name!r}; there are vtab:{", vtab:".join(TASKS)}')
    return found


def split_of(task: Task, split: str, sizes: Mapping[str, int]) -> str:
    """TFDS split of one of `SPLITS`; `sizes` is {TFDS split: examples}."""
    if split not in SPLITS:
        raise UserError(f'VTAB has no split {split!r}; it has {", ".join(SPLITS)}')
    name, percent = task.val
    part, end, _ = splits.parse(task.test)
    start = percent * sizes[name] // 100
    stop = round(end) * sizes[name] // 100 if part == name else sizes[name]
    parts = {
        'train800': 'train[:800]', 'val200': f'{name}[{start}:{start + 200}]',
        'train': f'train[:{start}]' if name == 'train' else 'train',
        'val': f'{name}[{start}:{stop}]', 'test': task.test,
    }  # fmt: skip
    return parts.get(split, f'{parts["train800"]}+{parts["val200"]}')


def brighten(data: bytes) -> bytes:
    """Converts a PNG of grey levels 0 and 1 to 0 and 255."""
    out = io.BytesIO()
    pixels = np.array(Image.open(io.BytesIO(data)))
    Image.fromarray(pixels * 255).save(out, 'PNG')
    return out.getvalue()


def means(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Averages {task: accuracy} to {'natural', 'specialized', 'structured', 'mean': of all 19}."""
    missing = TASKS.keys() - accuracies.keys()
    if missing:
        raise ValueError(f'no accuracy of {", ".join(sorted(missing))}')
    groups = {}
    for name, found in TASKS.items():
        groups.setdefault(found.group, []).append(accuracies[name])
    groups['mean'] = [accuracies[name] for name in TASKS]
    return {name: float(np.mean(values)) for name, values in groups.items()}
