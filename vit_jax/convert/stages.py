"""What loading makes of a checkpoint: a `Parsed` file first, then a `Loaded` model."""


from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np

from vit_jax.convert import views
from vit_jax.convert.documents import Notes
from vit_jax.convert.files import Array
from vit_jax.convert.pieces import Piece
from vit_jax.errors import UserError
from vit_jax.io.text import brief
from vit_jax.models.interface import Metadata

Values = bool | Literal['shapes']  # whether parameters are read, or their shapes alone
MOST_PIXELS = 65_536  # a side, as bounds.Pixels
TWO_TOWERS = (
    "the file has an image tower and a text tower; give part='image' (python -m vit_jax.convert "
    'SRC DST --part image) for the image tower alone; predict takes both with --labels'
)
NO_TEXT = "there is no text tower of a known kind in the file, which part='text' is for"
ENCODER = (
    "give part='encoder' (python -m vit_jax.convert SRC DST --part encoder) for the encoder alone"
)


class Around(NamedTuple):
    """What a file has around its encoder: the model that the encoder is the subtree `vit` of."""

    name: str  # 'a masked autoencoder'
    build: Callable[..., nn.Module]  # (encoder, fields) -> the whole model
    fields: tuple[str, ...]  # that a caller may give beside those of the encoder
    pieces: list[Piece]  # of the parameters beside `vit`
    classes: tuple[str, ...] | None = None  # names by label, of what the whole model predicts


class TextTower(NamedTuple):
    """What a file has beside an image tower: a text tower, and the scalars of both."""

    fields: dict[str, Any]  # of models.text.Text
    arrays: dict[str, Array]  # all of them, by their name in the pieces
    pieces: Callable[[nn.Module], list[Piece]]  # of the text tower
    scalars: list[Piece]  # of `temperature` and, if the file has one, `bias`
    unused: dict[str, str] = {}  # {name: why}
    notes: Notes = Notes()
    own: dict[str, Any] = {}  # fields of models.two_towers.TwoTowers


class Beside(NamedTuple):
    """What a folder has beside an encoder that is saved as the subtree `vit` of another model."""

    finish: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]  # encoder's arrays -> all
    config: dict[str, Any]  # keys of config.json in place of those of the encoder, or more
    document: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config  # the whole of it


class Parsed(NamedTuple):
    """A parsed file: fields of its model, and its arrays, whose values are not read yet."""

    family: str
    kind: str  # one of models.KINDS
    fields: dict[str, Any]
    arrays: dict[str, Array]  # by their name in the pieces
    pieces: Callable[[nn.Module], list[Piece]]
    table: tuple[str, int] | None  # (name, rows) of the position table
    unused: dict[str, str]  # {name: why}
    image_size: tuple[int, int] | None
    classes: tuple[str, ...] | None
    config: dict[str, Any] | None
    loss: str | None = None  # if the file states it; else that of the config
    notes: Notes = Notes()  # on what the documents leave open
    input_size: tuple[int, int] | None = None
    view: str | dict | None = None
    offsets: tuple[str, int] | None = None  # (name, rows) of a table of biases by offset
    around: Around | None = None  # None: the file is of an encoder or classifier alone
    text: TextTower | None = None  # beside this image tower, where the whole file is asked for


class Loaded(NamedTuple):
    """A loaded checkpoint: model, parameters, and what is needed to use them."""

    model: nn.Module
    # tree of float32 arrays, or of their shapes and dtypes; None where neither is asked for
    params: dict[str, Any] | None
    account: list[tuple[str, str, str]]  # (what was done, array or arrays, detail)
    source: str  # the family
    image_size: tuple[int, int] | None  # (height, width) of the parameters, None where any fits
    classes: tuple[str, ...] | None  # names by label
    config: dict[str, Any] | None  # of the run that made the weights
    loss: str | None = None  # training loss of the head: 'softmax' or 'sigmoid'; None: unknown
    input_size: tuple[int, int] | None = None  # (height, width) to which documents resize images
    stated_view: str | dict | None = None  # their view at that size

    @property
    def view(self) -> str | dict:
        """The view that turns an image into input, as `tasks.make_view` takes it.

        That of the first evaluation of the run that made the weights, else that of the documents
        beside them, else a central crop. A stated size before the crop is for the stated input
        size, and scales with it.
        """
        of_run = view_of(self.config)
        if of_run or isinstance(self.stated_view, str | None):
            return of_run or self.stated_view or 'central'
        return views.scale_view(self.stated_view, self.input_size, self.image_size)

    @property
    def metadata(self) -> Metadata:
        """Metadata of the model that `load` returns."""
        return Metadata(self.image_size, self.view, self.classes, self.loss)


def loss_of(config: dict[str, Any] | None) -> str | None:
    """Training loss of a classifier, 'softmax' or 'sigmoid', from a run's config; None: unknown."""
    objective = (config or {}).get('objective')
    loss = objective.get('loss') if isinstance(objective, dict) else None
    return loss if loss in ('softmax', 'sigmoid') else None


def view_of(config: dict[str, Any] | None) -> str | dict | None:
    """The view of a run's first evaluation; None if the config has none."""
    evals = (config or {}).get('evals')
    first = next(iter(evals.values()), None) if isinstance(evals, dict) else None
    return views.valid_view(first.get('view', 'central')) if isinstance(first, dict) else None


def size_of(
    image_size: int | Sequence[int] | None, name: str = 'image_size'
) -> tuple[int, int] | None:
    """(height, width) from an int or a pair, None from None; raises UserError for other values."""
    if image_size is None:
        return None
    pair = image_size if isinstance(image_size, (list, tuple)) else (image_size,) * 2
    if len(pair) != 2 or not all(type(n) is int and 0 < n <= MOST_PIXELS for n in pair):
        value = brief(repr(image_size))
        raise UserError(f'{name} is {value}, not a number of pixels or (height, width)')
    return tuple(pair)
