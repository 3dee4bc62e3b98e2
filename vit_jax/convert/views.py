"""Translates views to the settings of transformers' image processors and of timm.

Both resize the whole image with antialiasing and then crop it, as the views resize and
small_central do; the view central crops first. Differences that no setting expresses are returned
as notes for the user. hf_processor.py and timm_config.py read these settings back.
"""

import math
from typing import Any

from vit_jax.data.augment import VIEWS
from vit_jax.errors import UserError, check_choice, shown
from vit_jax.io import bounds

RESAMPLE = {'bilinear': 2, 'bicubic': 3}  # Pillow's numbers; transformers has no box for tensors
INTERPOLATION = {'bilinear': 'bilinear', 'bicubic': 'bicubic', 'area': 'box'}
ORDER = 'the image is resized there before it is cut, which moves edges by less than a pixel'
PIXELS = 'half pixels beside the window are rounded another way there (see rounding of {})'


def annotations(name: str) -> dict[str, Any]:
    """Annotations of the settings of a view."""
    view = VIEWS[name]
    return {key: view.__annotations__[key] for key in view.__kwdefaults__}


def checked(view: Any) -> str | dict | None:
    """Returns a view that a file states, unchanged; None unless it is valid in data/augment.py."""
    given = dict(name=view) if isinstance(view, str) else view
    if not isinstance(given, dict) or str(given.get('name')) not in VIEWS:
        return None
    known = annotations(given['name'])
    values = {k: v for k, v in given.items() if k != 'name'}
    sound = all(k in known and bounds.allows(known[k], v) for k, v in values.items())
    return view if sound else None


def given(view: Any) -> str | dict | None:
    """Returns a caller's view, unchanged; raises UserError that names what is wrong with it."""
    if view is None:
        return None
    values = dict(name=view) if isinstance(view, str) else view
    if not isinstance(values, dict):
        raise UserError(f'view is {shown(view)}, not a name or dict(name=..., arguments)')
    check_choice('view', values.get('name'), sorted(VIEWS))
    known = annotations(values['name'])
    for key, value in values.items():
        if key != 'name':
            check_choice(f'argument of the view {values["name"]}', key, sorted(known))
            bounds.check(f'view.{key}', value, known[key])
    return view


def grown(view: str | dict, old: tuple | None, new: tuple | None) -> str | dict:
    """A view for images of size `new`: scales the side before the crop from that for `old`."""
    if isinstance(view, str) or 'smaller' not in view or not old or not new or old == new:
        return view
    by = max(n / m for n, m in zip(new, old, strict=True))
    return dict(view) | {'smaller': max(round(view['smaller'] * by), *new)}


def arguments(view):
    """({argument: value}, notes) of a view; arguments are name, crop or smaller, method, antialias.

    A random view of training is replaced by the most similar view of evaluation.
    """
    given = dict(name=view) if isinstance(view, str) else dict(view)
    name, notes = given.get('name'), []
    if name not in ('resize', 'central', 'small_central'):
        nearest = 'central' if name in ('random_crop', 'inception') else 'resize'
        notes.append(f'the view {name} has chance in it; {nearest} stands for it')
        given = {k: v for k, v in given.items() if k in ('method', 'antialias')} | dict(
            name=nearest
        )
    defaults = VIEWS[given['name']].__kwdefaults__
    values = {k: v for k, v in defaults.items() if k != 'size'} | given
    if not values['antialias'] and values['method'] != 'area':
        notes.append('resized with antialias there, without it here')
    return values, notes


def note_rounding(values, whole, size, alike):
    """Notes on a window whose offset may be half a pixel, which libraries round differently.

    `size` is that of the window, `whole` that of the image around it (None: any), `alike` the
    values of `rounding` that match the library.
    """
    even = whole is not None and not any((n - m) % 2 for n, m in zip(whole, size, strict=True))
    if even or values.get('rounding', alike[0]) in alike:
        return []
    return [PIXELS.format(values['name'])]


def processor(view, size):
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
        whole = [round(n / values.get('crop', 1)) for n in size]
        if whole != list(size):
            cut = dict(height=whole[0], width=whole[1])
            settings |= dict(size=cut, do_center_crop=True, crop_size=crop_size)
            notes += note_rounding(values, whole, size, ('transformers', 'tensorflow'))
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


def pretrained(view, size):
    """({key: value} of timm's pretrained_cfg, notes) for images of `size` (height, width)."""
    values, notes = arguments(view)
    settings = dict(interpolation=INTERPOLATION[values['method']], crop_mode='center')
    if values['name'] == 'small_central':
        whole = values['smaller']
        if size[0] != size[1]:
            notes.append('resized by the aspect of the input there, by the shorter side here')
        notes += note_rounding(values, None, size, ('torchvision',))
    else:
        whole = round(size[0] / values['crop'])
    if values['name'] == 'central':
        notes.append(ORDER)
    if values['name'] == 'resize':
        settings['crop_mode'] = 'squash'
        pixels = [round(n / values['crop']) for n in size]
        notes += note_rounding(values, pixels, size, ('torchvision',))
    return settings | dict(crop_pct=share(size[0], whole)), notes


def share(part, whole):
    """The shortest decimal x with floor(part / x), which timm computes, equal to `whole`."""
    for digits in range(1, 17):
        x = round(part / whole, digits)
        if x > 0 and math.floor(part / x) == whole:
            return x
    return math.nextafter(part / whole, 0)
