"""Translates views to the settings of transformers' image processors and of timm.

Both resize the whole image with antialiasing and then crop it, as the views resize and
small_central do; the view central crops first. Differences that no setting expresses are returned
as notes for the user. hf/processor.py and timm/config.py read these settings back.
"""

import math
from collections.abc import Sequence
from typing import Any

from vit_jax.data.augment import VIEWS
from vit_jax.errors import UserError, check_choice, shown
from vit_jax.io import bounds

RESAMPLE = {'bilinear': 2, 'bicubic': 3}  # Pillow's numbers; transformers has no box for tensors
INTERPOLATION = {'bilinear': 'bilinear', 'bicubic': 'bicubic', 'area': 'box'}
ORDER = 'the image is resized there before it is cut, which moves edges by less than a pixel'
PIXELS = 'half pixels beside the window are rounded another way there (see rounding of {})'


def argument_types(name: str) -> dict[str, Any]:
    """Annotations of the arguments that a view takes as settings."""
    view = VIEWS[name]
    return {key: view.__annotations__[key] for key in view.__kwdefaults__}


def valid_view(view: Any) -> str | dict | None:
    """Returns a view that a file states, unchanged; None unless it is valid in data/augment.py."""
    values = dict(name=view) if isinstance(view, str) else view
    if not isinstance(values, dict) or str(values.get('name')) not in VIEWS:
        return None
    types = argument_types(values['name'])
    given = {k: v for k, v in values.items() if k != 'name'}
    valid = all(k in types and bounds.allows(types[k], v) for k, v in given.items())
    return view if valid else None


def check_view(view: Any) -> str | dict | None:
    """Returns a caller's view, unchanged; raises UserError that names what is wrong with it."""
    if view is None:
        return None
    values = dict(name=view) if isinstance(view, str) else view
    if not isinstance(values, dict):
        raise UserError(f'view is {shown(view)}, not a name or dict(name=..., arguments)')
    check_choice('view', values.get('name'), sorted(VIEWS))
    types = argument_types(values['name'])
    for key, value in values.items():
        if key != 'name':
            check_choice(f'argument of the view {values["name"]}', key, sorted(types))
            bounds.check(f'view.{key}', value, types[key])
    return view


def scale_view(
    view: str | dict, old: tuple[int, int] | None, new: tuple[int, int] | None
) -> str | dict:
    """A view for images of size `new`: scales the side before the crop from that for `old`."""
    if isinstance(view, str) or 'smaller' not in view or not old or not new or old == new:
        return view
    factor = max(n / m for n, m in zip(new, old, strict=True))
    return dict(view) | {'smaller': max(round(view['smaller'] * factor), *new)}


def arguments(view: str | dict) -> tuple[dict[str, Any], list[str]]:
    """({argument: value}, notes) of a view; arguments are name, crop or smaller, method, antialias.

    A random view of training is replaced by the most similar view of evaluation.
    """
    stated = dict(name=view) if isinstance(view, str) else dict(view)
    name, notes = stated.get('name'), []
    if name not in ('resize', 'central', 'small_central'):
        cropped = name in ('random_crop', 'small_crop', 'inception')
        nearest = 'central' if cropped else 'resize'
        notes.append(f'the view {name} has chance in it; {nearest} stands for it')
        stated = {k: v for k, v in stated.items() if k in ('method', 'antialias')} | dict(
            name=nearest
        )
    defaults = VIEWS[stated['name']].__kwdefaults__
    values = {k: v for k, v in defaults.items() if k != 'size'} | stated
    if not values['antialias'] and values['method'] != 'area':
        notes.append('resized with antialias there, without it here')
    return values, notes


def note_rounding(
    values: dict[str, Any],
    resized: Sequence[int] | None,
    size: tuple[int, int],
    same: Sequence[str],
) -> list[str]:
    """Notes on a window whose offset may be half a pixel, which libraries round differently.

    Args:
      values: arguments of the view.
      resized: size (height, width) of the image around the window; None: any.
      size: size (height, width) of the window.
      same: the values of `rounding` that match the library.
    """
    even = resized is not None and not any((n - m) % 2 for n, m in zip(resized, size, strict=True))
    if even or values.get('rounding', same[0]) in same:
        return []
    return [PIXELS.format(values['name'])]


def processor_settings(view: str | dict, size: tuple[int, int]) -> tuple[dict[str, Any], list[str]]:
    """({key: value} of preprocessor_config.json, notes) for images of `size` (height, width)."""
    values, notes = arguments(view)
    if values['method'] not in RESAMPLE:
        notes.append(f'resized by bilinear filter there, by {values["method"]} here')
    settings = dict(
        do_resize=True, size=dict(height=size[0], width=size[1]),
        resample=RESAMPLE.get(values['method'], 2), do_center_crop=False,
    )  # fmt: skip
    crop_size = dict(height=size[0], width=size[1])
    if values['name'] == 'resize':
        resized = [round(n / values.get('crop', 1)) for n in size]
        if resized != list(size):
            cut = dict(height=resized[0], width=resized[1])
            settings |= dict(size=cut, do_center_crop=True, crop_size=crop_size)
            notes += note_rounding(values, resized, size, ('transformers', 'tensorflow'))
        return settings, notes
    notes += note_rounding(values, None, size, ('transformers',))
    edge = values.get('smaller')
    if values['name'] == 'central':
        edge = round(max(size) / values['crop'])
        notes.append(ORDER)
        if size[0] != size[1]:
            notes.append('a square by its shorter side there, a window of the input here')
    settings |= dict(size=dict(shortest_edge=edge), do_center_crop=True, crop_size=crop_size)
    return settings, notes


def pretrained_settings(
    view: str | dict, size: tuple[int, int]
) -> tuple[dict[str, Any], list[str]]:
    """({key: value} of timm's pretrained_cfg, notes) for images of `size` (height, width)."""
    values, notes = arguments(view)
    settings = dict(interpolation=INTERPOLATION[values['method']], crop_mode='center')
    if values['name'] == 'small_central':
        resized = values['smaller']
        if size[0] != size[1]:
            notes.append('resized by the aspect of the input there, by the shorter side here')
        notes += note_rounding(values, None, size, ('torchvision',))
    else:
        resized = round(size[0] / values['crop'])
    if values['name'] == 'central':
        notes.append(ORDER)
    if values['name'] == 'resize':
        settings['crop_mode'] = 'squash'
        pixels = [round(n / values['crop']) for n in size]
        notes += note_rounding(values, pixels, size, ('torchvision',))
    return settings | dict(crop_pct=crop_share(size[0], resized)), notes


def crop_share(part: int, whole: int) -> float:
    """The shortest decimal x with floor(part / x) == whole, as timm computes it."""
    for digits in range(1, 17):
        x = round(part / whole, digits)
        if x > 0 and math.floor(part / x) == whole:
            return x
    return math.nextafter(part / whole, 0)
