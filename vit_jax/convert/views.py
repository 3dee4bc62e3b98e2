"""How an image becomes input, in the words of transformers' image processors and of timm.

Both resize the whole image before they cut out of it, with antialias; ours cut first. What no
setting of theirs expresses is returned as words for whoever exports.
"""

import math

from vit_jax.data.augment import VIEWS

RESAMPLE = {'bilinear': 2, 'bicubic': 3}  # Pillow's numbers; of tensors transformers has no box
INTERPOLATION = {'bilinear': 'bilinear', 'bicubic': 'bicubic', 'area': 'box'}
ORDER = 'the image is resized there before it is cut, which moves edges by less than a pixel'


def arguments(view):
    """{name, crop or smaller, method, antialias} of a view by its name or a dict; its notes.

    A view of training has for its counterpart the view of evaluation that keeps most of it.
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
            notes.append(ORDER)
        return settings, notes
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
    else:
        whole = round(size[0] / values.get('crop', 1))
        if values['name'] == 'central' or whole != size[0]:
            notes.append(ORDER)
    if values['name'] == 'resize':
        settings['crop_mode'] = 'squash'
    return settings | dict(crop_pct=share(size[0], whole)), notes


def share(part, whole):
    """The shortest decimal x for which floor(part / x), as timm has it, is `whole`."""
    for digits in range(1, 17):
        x = round(part / whole, digits)
        if x > 0 and math.floor(part / x) == whole:
            return x
    return math.nextafter(part / whole, 0)
