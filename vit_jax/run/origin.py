"""What a run was begun with beside its config: its data and JAX's settings, kept in facts.json.

A run that goes on is the same run only with the same examples in the same order, the same names of
classes and the same random numbers. Other versions, devices and flags of XLA round otherwise.
"""

import os

import jax
import jaxlib

from vit_jax.data.readers import facts
from vit_jax.errors import UserError
from vit_jax.io.text import printable
from vit_jax.run import workdir

FILE = 'facts.json'
ROUNDING = ('evals.', 'jaxlib', 'jax.version', 'jax.default_matmul', 'device_kind', 'xla_flags')
UNHEARD = ('--xla_force_host_platform_device_count', '--xla_dump', '--xla_gpu_enable_latency')
MOST_NAMED = 10  # classes


def of(source, evaluations):
    """{name: value}: `data.facts.of_run`, and what else decides the bits of a run."""
    flags = os.environ.get('XLA_FLAGS', '').split()
    return facts.of_run(source, evaluations) | {
        'jax.default_prng_impl': str(jax.config.jax_default_prng_impl),
        'jax.threefry_partitionable': bool(jax.config.jax_threefry_partitionable),
        'jax.enable_x64': bool(jax.config.jax_enable_x64),
        'jax.default_matmul_precision': str(jax.config.jax_default_matmul_precision),
        'jax.version': jax.__version__,
        'jaxlib': jaxlib.__version__,
        'device_kind': jax.devices()[0].device_kind,
        'xla_flags': ' '.join(sorted(f for f in flags if not f.startswith(UNHEARD))),
    }


def settle(path, parts, now, begun, *, allow_change):
    """Writes facts.json, with what `of` says `now`, and classes.json; returns what has changed.

    Raises UserError, with a table, where something is trained already (`begun`) and data or random
    numbers are others, unless `allow_change`; and always where the number of outputs would be.
    """
    classes = list(parts.source.classes)
    before = workdir.read_json(path / FILE) if begun else None
    known = workdir.read_json(path / 'classes.json') if begun else None
    changes = [] if before is None else [
        (key, before.get(key), now.get(key), not key.startswith(ROUNDING))
        for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)
        and not (key.startswith('evals.') and (key in before) != (key in now))
    ]
    told = difference(known, classes) if known is not None and known != classes else ''
    if told and len(known) != len(classes) and parts.model.num_classes == len(classes):
        raise UserError(
            f'the classes differ from those that {path} was begun with: {told}. Its head has '
            f'{len(known)} outputs; name another workdir, and --config.init_from={path} to begin '
            'from what is trained'
        )
    if (told or any(meaning for *_, meaning in changes)) and not allow_change:
        classes_ = f'\nclasses: {told}' if told else ''
        table = f'\n{workdir.table(changes)}' if changes else ''
        raise UserError(
            f'data or random numbers differ from those that {path} was begun with:'
            f'{table}{classes_}\nName another workdir, or give --allow_config_change to go on with '
            'what is there now, as after a damaged image was mended or removed.',
            several_lines=True,
        )
    if jax.process_index() == 0:
        workdir.write_json(path / 'classes.json', classes)
        workdir.write_json(path / FILE, now)
    return changes


def difference(before, now):
    """How two lists of names differ, in words."""
    before, now = ([printable(name) for name in names] for names in (before, now))
    parts = []
    for word, names, others in (('added', now, before), ('gone', before, now)):
        found = [name for name in names if name not in set(others)]
        if found:
            more = f' and {len(found) - MOST_NAMED} more' if len(found) > MOST_NAMED else ''
            parts.append(f'{word} {", ".join(found[:MOST_NAMED])}{more}')
    if not parts:
        i = next(i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b)
        parts.append(f'the order: label {i} was {before[i]}, and is {now[i]}')
    return '; '.join(parts)
