"""Models by name: `build('vit-b/16', num_classes=1000)`."""

import dataclasses
import difflib
import re

from vit_jax.errors import UserError
from vit_jax.models import vit


def fields(name):
    """{field: (annotation, default)} of the model of that name: what `build` takes."""
    match = re.fullmatch(r'vit-(\w+)/(\d+)', name)
    if not match or match[1] not in vit.SIZES:
        names = [f'vit-{size}/16' for size in vit.SIZES]
        raise UserError(f'no model {name!r}; there are {", ".join(names)}, with any patch size')
    size = {'patch_size': (int(match[2]),) * 2, **vit.SIZES[match[1]]}
    rows = {f.name: f for f in dataclasses.fields(vit.Vit) if f.name not in ('parent', 'name')}
    rows = {n: (f.type, size.get(n, f.default)) for n, f in rows.items()}
    return {'name': (str, name), **rows, 'patch_size': (int | tuple, size['patch_size'])}


def build(name, num_classes=1000, **values):
    """A flax module by name: 'vit-SIZE/PATCH' with the sizes of `vit.SIZES`; no file is read.

    `values` override any field of the module (`width=96`, `pool='gap'`, `dtype='bfloat16'`,
    `patch_size=4` or `(4, 8)`); a field that is none raises UserError and names the nearest.
    """
    valid = fields(name)
    for field in values:
        if field not in valid:
            near = difflib.get_close_matches(field, valid, 1, cutoff=0)[0]
            raise UserError(f'a model has no field {field!r}; the nearest is {near!r}')
    values = {f: default for f, (_, default) in valid.items()} | values
    values |= {'num_classes': num_classes, 'name': None}
    if isinstance(values['patch_size'], int):
        values['patch_size'] = (values['patch_size'],) * 2
    for field in ('patch_size', 'mean', 'std'):
        values[field] = tuple(values[field])
    model = vit.Vit(**values)
    model.check()
    return model
