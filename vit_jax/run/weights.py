"""The weights of a checkpoint, read without the config of its run."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vit_jax.errors import UserError
from vit_jax.models.parameters import leaf_name
from vit_jax.run.checkpoint import check_bits
from vit_jax.run.fingerprints import leaves_by_name
from vit_jax.run.orbax_errors import read_error, silence_repeats


def read_params(
    path: os.PathLike | str, *, average: bool | None, values: bool = True
) -> dict[str, np.ndarray | jax.ShapeDtypeStruct]:
    """Reads {name: array} of the parameters of one checkpoint.

    Args:
      path: a folder checkpoints/STEP.
      average: whether to read the moving average of the parameters. None: if there is one.
      values: whether to read the arrays; else these are shapes and dtypes, from the list of what
        was saved, and JAX does not start.

    Raises:
      Damaged: a file cannot be read, or a bit differs from what was saved.
      UserError: there is no moving average, or a server did not answer.
    """
    path = epath.Path(path)
    silence_repeats()
    try:
        saved = json.loads((path / 'contents' / 'metadata').read_text())
    except Exception as e:  # anything that the libraries raise for a broken file or a server
        raise read_error(path, 'its list of arrays', e) from e
    sources = sources_of(saved, average)
    if average and all(name == source for name, source in sources.items()):
        raise UserError(f'{path} has no moving average of its parameters (ema)')
    if values:
        arrays = read_arrays(path, set(sources.values()))
        check_bits(arrays, saved)
    else:
        arrays = {name: jax.ShapeDtypeStruct(*saved[name][:2]) for name in sources.values()}
    return {name.removeprefix('params/'): arrays[source] for name, source in sources.items()}


def sources_of(saved: Mapping[str, Any], average: bool | None) -> dict[str, str]:
    """{name of a parameter: name of the saved array that has it}; see `read_params`."""
    sources = {name: name for name in saved if name.startswith('params/')}
    for name in saved if average is not False else ():
        match = re.fullmatch(r'(?:opt_state/(?:.*/)?|extra/)average/(.*)', name)
        if match:
            sources[f'params/{match[1]}'] = name
    return sources


def read_arrays(path: epath.Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Reads {name: array} of some arrays of a checkpoint. Raises Damaged, UserError."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path / 'state').item_metadata.tree
            item = jax.tree_util.tree_map_with_path(
                lambda p, _: 0 if leaf_name(p) in wanted else ocp.PLACEHOLDER, tree
            )
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            state = checkpointer.restore(
                path / 'state', args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
            )
    except Exception as e:
        raise read_error(path, 'its arrays', e) from e
    return {name: value for name, value in leaves_by_name(state).items() if name in wanted}
