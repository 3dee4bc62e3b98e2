"""Facts of a run's start besides its config, data and settings of JAX, stored in facts.json.

A resumed run equals an uninterrupted one only with the same examples in the same order, the same
names of labels and the same random numbers. Other versions, devices and XLA flags change rounding.
"""

import os

import jax
import jaxlib
import numpy as np

from vit_jax.data.readers import facts
from vit_jax.errors import UserError
from vit_jax.io.text import printable
from vit_jax.models.parameters import leaf_name
from vit_jax.run import workdir

FILE = 'facts.json'
ROUNDING = ('evals.', 'jaxlib', 'jax.version', 'jax.default_matmul', 'device_kind', 'xla_flags')
IGNORED_FLAGS = ('--xla_force_host_platform_device_count', '--xla_dump', '--xla_gpu_enable_latency')
MOST_NAMED = 10


def of(parts):
    """{name: value} of the facts that determine a run's results to the bit.

    These are the facts of the data (`data.facts.of_run`), settings of JAX, versions and devices.
    """
    flags = os.environ.get('XLA_FLAGS', '').split()
    frozen = [
        (leaf_name(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(parts.objective.frozen)
    ]
    found = {'frozen': facts.digest(x for pair in frozen for x in pair)} if frozen else {}
    return facts.of_run(parts.source, parts.evals) | found | {
        'jax.default_prng_impl': str(jax.config.jax_default_prng_impl),
        'jax.threefry_partitionable': bool(jax.config.jax_threefry_partitionable),
        'jax.enable_x64': bool(jax.config.jax_enable_x64),
        'jax.default_matmul_precision': str(jax.config.jax_default_matmul_precision),
        'jax.version': jax.__version__,
        'jaxlib': jaxlib.__version__,
        'device_kind': jax.devices()[0].device_kind,
        'xla_flags': ' '.join(sorted(f for f in flags if not f.startswith(IGNORED_FLAGS))),
    }


def settle(path, parts, now, begun, *, allow_change):
    """Writes the facts `now`, from `of`, to facts.json, and the task's names; returns the changes.

    Raises UserError, with a table, if the run has checkpoints (`begun`) and data, names or random
    numbers differ from those of its start, unless `allow_change`.
    """
    before = workdir.read_json(path / FILE) if begun else None
    changes = [] if before is None else [
        (key, before.get(key), now.get(key), not key.startswith(ROUNDING))
        for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
        and not (key.startswith('evals.') and (key in before) != (key in now))
    ]
    told = {}
    for kind, names in parts.task.names.items() if begun else ():
        known = workdir.read_names(path / f'{kind}.json')
        if known is not None and known != list(names):
            told[kind] = difference(known, list(names))
            outputs = getattr(parts.model, f'num_{kind}', None)  # of a head: num_classes
            if len(known) != len(names) == outputs:
                raise UserError(
                    f'the {kind} differ from those that {path} was begun with: {told[kind]}. Its '
                    f'head has {len(known)} outputs; name another workdir, and '
                    f'--config.init_from={path} to begin from what is trained'
                )
    if (told or any(meaning for *_, meaning in changes)) and not allow_change:
        table = [workdir.table(changes)] if changes else []
        raise UserError(
            '\n'.join([
                f'data or random numbers differ from those that {path} was begun with:',
                *table, *(f'{kind}: {text}' for kind, text in told.items()),
                'Name another workdir (--config.init_from begins from what is trained here), or '
                'give --allow_config_change to go on with what is there now, as after a damaged '
                'image was mended or removed.',
            ]),
            several_lines=True,
        )  # fmt: skip
    if jax.process_index() == 0:
        for kind, names in parts.task.names.items():
            workdir.write_json(path / f'{kind}.json', list(names))
        workdir.write_json(path / FILE, now)
    return changes


def difference(before, now):
    """Describes the difference between two lists of names."""
    before, now = ([printable(name) for name in names] for names in (before, now))
    parts = []
    for word, names, others in (('added', now, before), ('gone', before, now)):
        found = [name for name in names if name not in set(others)]
        if found:
            more = f' and {len(found) - MOST_NAMED} more' if len(found) > MOST_NAMED else ''
            parts.append(f'{word} {", ".join(found[:MOST_NAMED])}{more}')
    if not parts:
        i = next(i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b)
        parts.append(f'the order: number {i} was {before[i]}, and is {now[i]}')
    return '; '.join(parts)
