"""Tasks: each makes the arrays of an example from the raw fields of a record.

A task is a function (source, *, settings) -> `Task`; its settings are in the section `data`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import distort, images
from vit_jax.data.augment import FIXED, VIEWS
from vit_jax.data.sources import Source
from vit_jax.errors import UserError, check_choice
from vit_jax.io.bounds import Interval, NonNegative, Share, Size

# Distortions of each kind of crop in DINO, in order (facebookresearch/dino main_dino.py:421-456).
COLOURS = (
    dict(name='color_jitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
         probability=0.8),
    dict(name='greyscale', probability=0.2),
)  # fmt: skip
MULTI_CROP = {
    'first': (*COLOURS, dict(name='blur', probability=1.0)),
    'second': (
        *COLOURS, dict(name='blur', probability=0.1), dict(name='solarize', probability=0.2)
    ),
    'local': (*COLOURS, dict(name='blur', probability=0.5)),
}  # fmt: skip


class Task(NamedTuple):
    """Defines the examples of a data set.

    Attributes:
      blank: {name: numpy array} of an example that is masked out. Shapes and dtypes are those of
        every example; the pipeline adds `mask` and `id`.
      read: (record, rng) -> {name: numpy array}, from the record's raw fields ({'image': bytes,
        'label': 3}) and a numpy.random.Generator of its own. It raises images.Unreadable, or
        UserError, where the record can't be used. Picklable.
      names: meaning of numbers in the arrays, {'classes': ('cat', 'dog')}; a run saves them as
        classes.json and compares them when it resumes.
    """

    blank: dict
    read: Callable
    names: dict = {}


def classify(
    source: Source,
    *,
    view: str | dict,
    image_size: Size,
    augment: tuple[str | dict, ...] = (),
) -> Task:
    """An image and its class or classes: `image` uint8 [H, W, 3], `label` int32 [] or [L].

    Where examples have several labels, `label` is padded with -1.

    Args:
      view: how an image is cropped and resized, by name or as dict(name=..., arguments), see
        Views.
      image_size: size of the images in pixels: one number, or (height, width).
      augment: augmentations that follow the view, each by name or as dict(name=..., arguments), see
        Augmentations.
    """
    most = getattr(source.records, 'max_labels', None) or 1
    shape = () if most == 1 else (most,)
    blank = {
        'image': np.zeros((*size_of(image_size), 3), np.uint8),
        'label': np.full(shape, -1 if shape else 0, np.int32),
    }
    read = partial(
        image_and_label, view=make_view(view, image_size, augment), shape=shape,
        classes=len(source.classes),
    )  # fmt: skip
    return Task(blank, read, {'classes': tuple(source.classes)})


def image_and_label(
    record: Mapping[str, Any],
    rng: np.random.Generator,
    *,
    view: Callable,
    shape: tuple[int, ...],
    classes: int,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `classify`; `shape` is that of the label."""
    label = np.asarray(record['label'], np.int32).reshape(shape)
    try:
        image = view(images.read(record['image']), rng)  # a JPEG is decoded here
    except images.Unreadable as e:
        raise images.Unreadable(f'unreadable image: {e}') from e
    least = -1 if shape else 0
    wrong = label[(label < least) | (label >= classes)]
    if wrong.size:
        raise UserError(
            f'label {wrong.flat[0]} is out of range: the data set has {classes} classes'
        )
    return {'image': image, 'label': label}


def crops(
    source: Source,
    *,
    image_size: Size = 224,
    local_size: Size = 96,
    local_count: NonNegative[int] = 8,
    global_area: Interval[Share] = (0.4, 1.0),
    local_area: Interval[Share] = (0.05, 0.4),
    distort: bool = True,
) -> Task:
    """Random crops of one image: `global` uint8 [2, H, W, 3], `local` uint8 [L, h, w, 3].

    Crops and distortions are those of DINO (arXiv:2104.14294; facebookresearch/dino main_dino.py,
    DataAugmentationDINO): a window as torchvision draws it, resized by a bicubic filter and
    mirrored with probability 1/2, then `MULTI_CROP`, other distortions for the first global crop,
    the second and the local ones. Labels are not read.

    Args:
      image_size: size of the global crops in pixels: one number, or (height, width).
      local_size: size of the local crops in pixels.
      local_count: number L of local crops; without any, examples have no `local`.
      global_area: range of a global crop's share of the image's area.
      local_area: range of a local crop's share of the image's area.
      distort: whether colours are jittered and crops blurred and solarised, as `MULTI_CROP` says.
    """
    sizes = {'global': (2, *size_of(image_size)), 'local': (local_count, *size_of(local_size))}
    blank = {name: np.zeros((*size, 3), np.uint8) for name, size in sizes.items() if size[0]}
    view = dict(name='inception_torchvision', method='bicubic')
    large, small = view | dict(area=global_area), view | dict(area=local_area)
    after = MULTI_CROP if distort else dict.fromkeys(MULTI_CROP, ())
    views = {
        'global': [make_view(large, image_size, after[name]) for name in ('first', 'second')],
        'local': [make_view(small, local_size, after['local'])] * local_count,
    }
    return Task(blank, partial(crops_of, views={name: views[name] for name in blank}))


def crops_of(
    record: Mapping[str, Any], rng: np.random.Generator, *, views: Mapping[str, Sequence[Callable]]
) -> dict[str, np.ndarray]:
    """Makes {name: uint8 [number of views, H, W, 3]} of an image, which is decoded once."""
    image = np.asarray(images.read(record['image']))
    return {name: np.stack([view(image, rng) for view in each]) for name, each in views.items()}


def size_of(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Converts an int or (height, width) to (height, width)."""
    return (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)


def check_view(name: Any) -> str:
    """Returns the name of a view; raises UserError if it is unknown."""
    return check_name('view', name, VIEWS)


def check_augmentation(name: Any) -> str:
    """Returns the name of an augmentation; raises UserError if it is unknown."""
    return check_name('augmentation', name, distort.AUGMENTATIONS)


def check_name(kind: str, name: Any, known: Mapping[str, Callable]) -> str:
    """Returns a name that is `known`; raises UserError for any other."""
    check_choice(kind, name, sorted(known))
    return name


class View(NamedTuple):
    """A view and augmentations: (image, rng) -> uint8 [H, W, 3], or in two steps.

    A task whose examples have label maps or boxes draws the geometry and applies it to each:

        geometry = view.place(image.shape[:2], rng)
        image = view.distort(geometry.image(image), rng)
        label_map = geometry.label_map(label_map, fill=255)

    Attributes:
      place: (shape, rng) -> geometry.Geometry.
      steps: augmentations (image, rng) -> image.
    """

    place: Callable
    steps: tuple = ()

    def __call__(
        self, image: np.ndarray | images.Encoded, rng: np.random.Generator | None
    ) -> np.ndarray:
        return self.distort(self.place(image.shape[:2], rng).image(image), rng)

    def distort(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Applies the augmentations to a resized image."""
        for step in self.steps:
            image = step(image, rng)
        return image


def make_view(
    view: str | dict,
    image_size: int | tuple[int, int],
    augmentations: Sequence[str | dict] = (),
    in_place: bool = False,
) -> View:
    """Makes a view with augmentations, each by name or as a dict of its name and settings.

    Args:
      view: one of augment.VIEWS.
      image_size: a side in pixels, or (height, width).
      augmentations: some of distort.AUGMENTATIONS.
      in_place: whether to raise UserError for augmentations that move pixels: label maps and boxes
        do not follow them.
    """
    view = dict(name=view) if isinstance(view, str) else dict(view)
    name = check_view(view.pop('name', None))
    place, steps = partial(VIEWS[name], size=size_of(image_size), **view), []
    for step in augmentations:
        step = dict(name=step) if isinstance(step, str) else dict(step)
        name = check_augmentation(step.pop('name', None))
        if in_place and name in distort.MOVING:
            fixed = ', '.join(sorted(distort.AUGMENTATIONS.keys() - set(distort.MOVING)))
            raise UserError(
                f'the augmentation {name} moves pixels, which label maps and boxes do not follow; '
                f'{fixed} do not'
            )
        steps.append(partial(distort.AUGMENTATIONS[name], **step))
    return View(place, tuple(steps))


def fixed_view(view: str | dict, image_size: int | tuple[int, int]) -> View:
    """`make_view` for evaluation; raises UserError for a random view."""
    name = view if isinstance(view, str) else dict(view).get('name')
    if check_view(name) not in FIXED:
        raise UserError(f'the view {name} draws at random; give one of {", ".join(FIXED)}')
    return make_view(view, image_size)
