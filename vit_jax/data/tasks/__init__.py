"""Tasks: each file makes the arrays of an example from the raw fields of a record.

A task is a function (source, *, settings) -> `Task`; its settings are in the section `data`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import distort, images, label_maps
from vit_jax.data.augment import FIXED, READ_LABELS, VIEWS
from vit_jax.data.geometry import Geometry
from vit_jax.data.sources import Source
from vit_jax.errors import UserError, check_choice

WHOLE = ('fit', 'resize')  # views that show the whole image


class Task(NamedTuple):
    """Defines the examples of a data set.

    Attributes:
      blank: {name: numpy array} of an example that is masked out. Shapes and dtypes are those of
        every example; the pipeline adds `mask` and `id`.
      read: (record, rng) -> {name: numpy array}, from the record's raw fields ({'image': bytes,
        'label': 3}) and a numpy.random.Generator of its own. It raises images.Unreadable, or
        UserError, where the record can't be used. Picklable. A parameter `out` is optional, None or
        {name: array} of the example's places in a batch: it may fill these and return them, which
        saves a copy.
      names: meaning of numbers in the arrays, {'classes': ('cat', 'dog')}; a run saves them as
        classes.json and compares them when it resumes.
      tokenizer: what made the ids of texts, a tokenizers.Named; a run saves its tokenizer and
        refuses another one when it resumes.
      rest: `read` without the `image`, which it does not look at. None where a task has none, or
        where the image is drawn at random, so that it differs from step to step.
    """

    blank: dict
    read: Callable
    names: dict = {}
    tokenizer: Any = None
    rest: Callable | None = None


def class_names(
    source: Source, classes: int | Sequence[str] | None, key: str, background: bool = False
) -> tuple[str, ...]:
    """Names of classes: given, numbers up to a count, or those of a data set.

    Raises UserError, with the setting's key, if there are none. With `background` it comes first.
    """
    given = range(classes) if isinstance(classes, int) else classes
    found = tuple(map(str, source.classes if given is None else given))
    if not found:
        raise UserError(
            f'the data set has no names of classes (classes.txt); {key} gives them, or their number'
        )
    return (label_maps.BACKGROUND, *found) if background else found


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
      draw: one of augment.VIEWS with its settings.
      steps: augmentations (image, rng) -> image.
      reads_labels: whether `draw` takes a label map as its third argument.
    """

    draw: Callable
    steps: tuple = ()
    reads_labels: bool = False

    def __call__(
        self,
        image: np.ndarray | images.Encoded,
        rng: np.random.Generator | None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Makes the image; without augmentations it may be in `out`, as from images.resized."""
        geometry = self.place(image.shape[:2], rng)
        return self.distort(geometry.image(image, None if self.steps else out), rng)

    def place(
        self,
        shape: tuple[int, int],
        rng: np.random.Generator | None,
        labels: np.ndarray | None = None,
    ) -> Geometry:
        """Draws the geometry for an image [H, W]; `labels` [H, W] is its label map, if it has one.

        The largest number of the label map's dtype is that of ignored pixels.
        """
        return self.draw(shape, rng, *([labels] if self.reads_labels else []))

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
    draw, steps = partial(VIEWS[name], size=size_of(image_size), **view), []
    reads_labels = name in READ_LABELS
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
    return View(draw, tuple(steps), reads_labels)


def is_fixed(view: str | dict, augmentations: Sequence[str | dict] = ()) -> bool:
    """Whether a view with augmentations, of which all are random, draws nothing."""
    name = view if isinstance(view, str) else dict(view).get('name')
    return check_view(name) in FIXED and not augmentations


def fixed_view(view: str | dict, image_size: int | tuple[int, int]) -> View:
    """`make_view` for evaluation; raises UserError for a random view."""
    if not is_fixed(view):
        name = view if isinstance(view, str) else view['name']
        raise UserError(f'the view {name} draws at random; give one of {", ".join(FIXED)}')
    return make_view(view, image_size)


def whole_view(view: str | dict, image_size: int | tuple[int, int]) -> View:
    """`make_view` for evaluation at the images' own size; raises UserError if it may cut."""
    if (name := view if isinstance(view, str) else view.get('name')) not in WHOLE:
        raise UserError(f'view {name} may cut pixels off; {" and ".join(WHOLE)} keep the image')
    return make_view(view, image_size, in_place=True)


def place_of(geometry: Geometry, shape: tuple[int, int]) -> np.ndarray:
    """Where a view shows an image [H, W]: float32 [2, 2], (scale, offset) of rows and of columns.

    What is at a position p of the image is at scale * p + offset in the view. Raises Unreadable
    unless the view shows the whole image.
    """
    sides = zip(geometry.offset, geometry.resized, geometry.size, strict=True)
    if geometry.window != (0, 0, *shape) or any(o > 0 or r > o + n for o, r, n in sides):
        raise images.Unreadable('the view does not show the whole image')
    scales = np.divide(geometry.resized, shape)
    return np.stack([scales, np.negative(geometry.offset)], axis=1).astype(np.float32)


def check_canvas(shape: tuple[int, int], canvas: tuple[int, int]) -> None:
    """Raises Unreadable if an image [H, W] is larger than a canvas [Y, X]."""
    if shape[0] > canvas[0] or shape[1] > canvas[1]:
        raise images.Unreadable(
            f'the image has {shape[1]} x {shape[0]} pixels, above canvas={canvas[1]} x {canvas[0]}'
        )
