"""Models by name: `build('vit-b/16', num_classes=1000)`."""

import dataclasses
import difflib
import re

import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models import vit


def build(name, num_classes=1000, **fields):
    """A flax module by name: 'vit-SIZE/PATCH' with the sizes of `vit.SIZES`; no file is read.

    `fields` override any field of the module (`width=96`, `pool='gap'`, `dtype='bfloat16'`,
    `patch_size=4` or `(4, 8)`); a field that is none raises UserError and names the nearest.
    """
    match = re.fullmatch(r'vit-(\w+)/(\d+)', name)
    if not match or match[1] not in vit.SIZES:
        names = [f'vit-{size}/16' for size in vit.SIZES]
        raise UserError(f'no model {name!r}; there are {", ".join(names)}, with any patch size')
    valid = [f.name for f in dataclasses.fields(vit.Vit) if f.name not in ('parent', 'name')]
    for field in fields:
        if field not in valid:
            near = difflib.get_close_matches(field, valid, 1, cutoff=0)[0]
            raise UserError(f'a model has no field {field!r}; the nearest is {near!r}')
    fields = {'patch_size': int(match[2]), **vit.SIZES[match[1]], **fields}
    if isinstance(fields['patch_size'], int):
        fields['patch_size'] = (fields['patch_size'],) * 2
    for field in ('patch_size', 'mean', 'std'):
        if field in fields:
            fields[field] = tuple(fields[field])
    if 'dtype' in fields:
        fields['dtype'] = jnp.dtype(fields['dtype'])
    model = vit.Vit(num_classes=num_classes, **fields)
    model.check()
    return model
