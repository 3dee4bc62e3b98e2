"""Builds models by name: `build('vit-b/16', num_classes=1000)`. Sizes are rows of tables."""

import dataclasses
import difflib
import re
from typing import Any

import flax.linen as nn

from vit_jax.errors import UserError, shown
from vit_jax.io import bounds
from vit_jax.models import interface, mixer, resnet, text, vit

# Units by stage and patch size in features, by published name: arXiv:2010.11929 section 3.1 (r50),
# arXiv:2106.10270 table 2 (r26, and r, whose patches have 32 pixels in spite of the 16).
HYBRIDS = {
    ('r', 16): ((), 8),
    ('r26', 32): ((2, 2, 2, 2), 1),
    ('r50', 16): ((3, 4, 9), 1),
    ('r50', 32): ((3, 4, 6, 3), 1),
}
NO_SETTINGS = ('parent', 'name', 'metadata')  # fields of a module that `build` does not take
KINDS = {vit.Vit: 'vit', mixer.Mixer: 'mixer', resnet.Bit: 'bit', text.Text: 'text'}
NAMES = (
    "vit-SIZE/PATCH (SIZE: {}), 'vit/PATCH' with every size a field, mixer-SIZE/PATCH (SIZE: {}), "
    "the hybrids {}, text-SIZE (or 'text') of the sizes of vit, and bit-rDEPTHxWIDTH (DEPTH: {}), "
    "or 'bit' with its units a field"
)


def parts(name: str) -> tuple[type[nn.Module], dict[str, Any]]:
    """(module, {field: value}) that a name stands for; raises UserError for an unknown name."""
    given = name if isinstance(name, str) else ''
    match = re.fullmatch(r'bit(?:-r(\d+)x(\d+))?', given)
    if match and (match[1] is None or int(match[1]) in resnet.DEPTHS and int(match[2])):
        sizes = dict(units=resnet.DEPTHS[int(match[1])], width=float(match[2])) if match[1] else {}
        return resnet.Bit, sizes
    match = re.fullmatch(r'text(?:-(\w+))?', given)
    if match and match[1] in (None, *vit.SIZES):
        return text.Text, vit.SIZES.get(match[1], {})
    match = re.fullmatch(r'(?:(r\d*)\+)?(vit|mixer)(?:-(\w+))?/(\d+)', given)
    root, kind, size, patch = match.groups() if match else (None,) * 4
    module, sizes = {'mixer': (mixer.Mixer, mixer.SIZES)}.get(kind, (vit.Vit, vit.SIZES))
    valid = match and (size in sizes or size is None and root is None)
    if valid and root and (kind != 'vit' or (root, int(patch)) not in HYBRIDS):
        valid = False
    if not valid or not int(patch):
        hybrids = ', '.join(f'{r}+vit-SIZE/{p}' for r, p in HYBRIDS)
        depths = ', '.join(map(str, resnet.DEPTHS))
        raise UserError(
            f'no model {shown(name)}; there are '
            + NAMES.format(', '.join(vit.SIZES), ', '.join(mixer.SIZES), hybrids, depths)
        )
    values = {'patch_size': (int(patch),) * 2, **(sizes[size] if size else {})}
    if root:
        units, inner = HYBRIDS[root, int(patch)]
        values |= {'resnet': units, 'patch_size': (inner,) * 2}
    return module, values


def fields(name: str) -> dict[str, tuple[Any, Any]]:
    """{field: (annotation, default)} that `build` takes for the model of that name."""
    module, values = parts(name)
    rows = {f.name: f for f in dataclasses.fields(module) if f.name not in NO_SETTINGS}
    rows = {n: (f.type, values.get(n, f.default)) for n, f in rows.items()}
    if 'patch_size' in rows:
        rows['patch_size'] = (bounds.Positive[int] | rows['patch_size'][0], values['patch_size'])
    rows = {n: (kind, bounds.section(default)) for n, (kind, default) in rows.items()}
    return {'name': (str, name), **rows}


def build(name: str, num_classes: int | None = 1000, **values: Any) -> nn.Module:
    """Builds a Flax module by name: 'vit-b/16', 'r50+vit-b/16', 'mixer-b/16', 'text-b'.

    `values` override any field of the module (`width=96`, `pool='gap'`, `dtype='bfloat16'` or
    `jnp.bfloat16`, `patch_size=4` or `(4, 8)`, `style=dict(norm='rms')`). Reads no file. Raises
    UserError for an unknown field and names the nearest.
    """
    module, _ = parts(name)
    valid = fields(name)
    for field in values.keys() & {'dtype', 'matmul_dtype'}:
        values[field] = interface.dtype_name(values[field])
    for field in values:
        if field not in valid:
            nearest = difflib.get_close_matches(field, valid, 1, cutoff=0)[0]
            raise UserError(f'a model has no field {field!r}; the nearest is {nearest!r}')
        bounds.check(f'model.{field}', values[field], valid[field][0])
    values = {f: default for f, (_, default) in valid.items()} | values
    values |= {'num_classes': num_classes, 'name': None}
    if isinstance(values.get('patch_size'), int):
        values['patch_size'] = (values['patch_size'],) * 2
    values = {f: bounds.grouped(valid[f][0], v) if f in valid else v for f, v in values.items()}
    model = module(**values)
    model.check()
    return model


def describe(model: nn.Module) -> dict[str, Any]:
    """{field: value} of a model and a `name`, with which `build` makes the same model."""
    values = {
        f.name: bounds.section(getattr(model, f.name))
        for f in dataclasses.fields(model)
        if f.name not in NO_SETTINGS
    }
    return {'name': name_of(model, values), **values}


def name_of(model: nn.Module, values: dict[str, Any]) -> str:
    """The name that stands for all sizes, 'vit-b/16'; else 'vit/16', where sizes are fields."""
    if isinstance(model, resnet.Bit):
        depth = next((n for n, units in resnet.DEPTHS.items() if units == model.units), None)
        has_name = depth and model.width == int(model.width)
        return f'bit-r{depth}x{int(model.width)}' if has_name else 'bit'
    sizes, kind = (
        (mixer.SIZES, 'mixer') if isinstance(model, mixer.Mixer) else (vit.SIZES, 'vit')
    )
    size = next(
        (s for s, row in sizes.items() if all(values[k] == v for k, v in row.items())), None
    )
    size = f'-{size}' if size else ''
    if isinstance(model, text.Text):
        return f'text{size}'
    hybrid = next(
        (f'{r}+vit{size}/{p}' for (r, p), (units, inner) in HYBRIDS.items()
         if size and values.get('resnet') == units and values['patch_size'] == (inner,) * 2),
        None,
    )  # fmt: skip
    return hybrid or f'{kind}{size}/{values["patch_size"][0]}'
