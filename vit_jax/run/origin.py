"""Facts of a run's start besides its config, data and settings of JAX, stored in facts.json.

A resumed run equals an uninterrupted one only with the same examples in the same order, the same
names of its outputs and the same random numbers. Other versions, machines and XLA flags change
rounding.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jaxlib
import numpy as np
from etils import epath

from vit_jax.data.readers import facts
from vit_jax.data.tokenizers import folders
from vit_jax.errors import UserError
from vit_jax.io.text import printable
from vit_jax.models.parameters import leaf_name
from vit_jax.run import determinism, machine, workdir
from vit_jax.run.changes import Change, table

FILE = 'facts.json'
MACHINE = 'machine.'
BITS = (MACHINE, 'mesh.', 'jaxlib', 'jax.version', 'jax.default_matmul', 'device_kind', 'xla_flags')
ROUNDING = ('evals.', *BITS)
IGNORED_FLAGS = (
    '--xla_force_host_platform_device_count', '--xla_dump', '--xla_gpu_enable_latency',
    determinism.DUMP, determinism.LOAD,
)  # fmt: skip
MOST_NAMED = 10


def facts_of(parts: Any) -> dict[str, Any]:
    """{name: value} of the facts that determine a run's results to the bit.

    These are the facts of the data (`data.readers.facts.of_run`), settings of JAX, versions and
    devices. `parts` are assembly.Parts.
    """
    flags = determinism.flags_of(os.environ.get('XLA_FLAGS', ''))
    frozen = [
        (leaf_name(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(parts.objective.frozen)
    ]
    weights = {'frozen': facts.digest(x for pair in frozen for x in pair)} if frozen else {}
    named = parts.task.tokenizer
    words = {} if named is None else {'data.tokenizer': named.loaded.fingerprint}
    return facts.of_run(parts.source, parts.evals) | words | weights | {
        'jax.default_prng_impl': str(jax.config.jax_default_prng_impl),
        'jax.threefry_partitionable': bool(jax.config.jax_threefry_partitionable),
        'jax.enable_x64': bool(jax.config.jax_enable_x64),
        'jax.default_matmul_precision': str(jax.config.jax_default_matmul_precision),
        'jax.version': jax.__version__,
        'jaxlib': jaxlib.__version__,
        'device_kind': jax.devices()[0].device_kind,
        'xla_flags': ' '.join(sorted(f for f in flags if not f.startswith(IGNORED_FLAGS))),
        **{MACHINE + name: value for name, value in machine.facts().items()},
    }


def shared(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that must be equal in all processes: those of data, names and versions."""
    return {k: v for k, v in facts.items() if not k.startswith((MACHINE, 'xla_flags'))}


def record_facts(
    path: epath.Path, parts: Any, now: Mapping[str, Any], begun: bool, *, allow_change: bool
) -> list[Change]:
    """Writes facts.json, the names of the task and its tokenizer; returns the changes of the facts.

    Args:
      path: workdir of the run.
      parts: assembly.Parts.
      now: what `facts_of` returns.
      begun: whether the run has checkpoints.
      allow_change: whether data, names and random numbers may differ from those of its start.

    Raises:
      UserError: the run has begun, and they differ; with a table.
    """
    before = workdir.read_json(path / FILE) if begun else None
    changes = [] if before is None else [
        Change(key, before.get(key), now.get(key), matters=not key.startswith(ROUNDING))
        for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
        and not (key.startswith('evals.') and (key in before) != (key in now))
        and not (key.endswith('.sample') and None in (before.get(key), now.get(key)))  # an address
    ]
    renamed = {}  # {kind of names: description of the difference}
    for kind, names in parts.task.names.items() if begun else ():
        first = workdir.read_names(path / f'{kind}.json')
        if first is not None and first != list(names):
            renamed[kind] = describe_difference(first, list(names))
            outputs = getattr(parts.model, f'num_{kind}', None)  # of a head, one for each name
            if len(first) != len(names) == outputs:
                raise UserError(
                    f'the {kind} differ from those that {path} was begun with: {renamed[kind]}. '
                    f'Its head has {len(first)} outputs; name another workdir, and '
                    f'--config.init_from={path} to begin from what is trained'
                )
    if (renamed or any(change.matters for change in changes)) and not allow_change:
        rows = [table(changes)] if changes else []
        raise UserError(
            '\n'.join([
                f'data or random numbers differ from those that {path} was begun with:',
                *rows, *(f'{kind}: {text}' for kind, text in renamed.items()),
                'Name another workdir (--config.init_from begins from what is trained here), or '
                'give --allow_config_change to go on with what is there now, as after a damaged '
                'image was repaired or removed.',
            ]),
            several_lines=True,
        )  # fmt: skip
    if jax.process_index() == 0:
        for kind, names in parts.task.names.items():
            workdir.write_json(path / f'{kind}.json', list(names))
        if parts.task.tokenizer is not None:
            parts.task.tokenizer.loaded.save(path / folders.INSIDE)
        workdir.write_json(path / FILE, now)
    return changes


def describe_difference(before: list[str], now: list[str]) -> str:
    """Describes the difference between two lists of names."""
    before, now = ([printable(name) for name in names] for names in (before, now))
    parts = []
    for word, names, others in (('added', now, before), ('gone', before, now)):
        alone = [name for name in names if name not in set(others)]
        if alone:
            more = f' and {len(alone) - MOST_NAMED} more' if len(alone) > MOST_NAMED else ''
            parts.append(f'{word} {", ".join(alone[:MOST_NAMED])}{more}')
    if not parts:
        i = next(i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b)
        parts.append(f'the order: number {i} was {before[i]}, and is {now[i]}')
    return '; '.join(parts)
