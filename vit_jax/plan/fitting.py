"""Searches for settings with which a run fits into memory, by compiling it."""

from vit_jax import assembly
from vit_jax import config as configs
from vit_jax.errors import UserError
from vit_jax.plan import estimate

# Share of the model's arithmetic that a policy recomputes, in equivalent time: it orders the
# search and predicts nothing. The second policy recomputes attention, the third the forward pass.
REMAT = {'none': 0.0, 'dots_with_no_batch_dims_saveable': 0.12, 'full': 1 / 3}


def seconds_more(config, plan, policy, fsdp, accumulate):
    """Approximate extra time of a step: weight gathers, recomputation, accumulated gradients."""
    peaks, count = plan['peaks'], plan['parameters']
    flops = 3 * (plan['forward_flops'] or 0) * config.data.batch_size / plan['devices']
    links = 1 if fsdp < 4 else 2
    gathers = accumulate * 3 * 2 * count * (fsdp - 1) / fsdp / (links * peaks['link'])
    again = REMAT.get(policy, 0) * flops / peaks['flops']
    kept = (accumulate - 1) * 8 * count / fsdp / peaks['bandwidth']
    return gathers + 2 * again + kept


def candidates(config, plan):
    """Changes of settings that reduce memory, cheapest first: [{'mesh.fsdp': 8, ...}]."""
    rows = []
    own, degree, parts = config.model.get('remat'), config.mesh.fsdp, config.accumulate
    policies = [None] if own is None else [p for p in REMAT if REMAT[p] >= REMAT[own]]
    for policy in policies:
        for fsdp in (degree * 2**k for k in range(11)):
            for accumulate in (parts * 2**k for k in range(6)):
                changes = {}
                if policy != own:
                    changes['model.remat'] = policy
                if fsdp > degree:
                    changes |= {'mesh.data': -1} if config.mesh.data != -1 else {}
                    changes['mesh.fsdp'] = fsdp
                if accumulate > parts:
                    changes['accumulate'] = accumulate
                if changes and fsdp * config.mesh.tensor <= plan['devices']:
                    cost = seconds_more(config, plan, policy, fsdp, accumulate)
                    rows.append((cost, len(rows), changes))
    return [changes for *_, changes in sorted(rows, key=lambda row: row[:2])]


def with_changes(config, changes):
    return configs.override(config.to_dict(), [(k, str(v)) for k, v in changes.items()], config)


def as_flags(changes):
    return ' '.join(f'--config.{key}={value}' for key, value in changes.items())


def fit(config, source, found, title, first, say, **options):
    """Returns (changes that fit, their plan), or (None, None); reports each trial to `say`.

    `first` is the plan without changes. Candidates that can't fit are not compiled: those whose
    state exceeds the memory, or whose activations would have to shrink more than the micro-batch.
    """
    memory = first['memory']
    available = memory['available']
    activations = {config.model.get('remat'): memory['activations'] * config.accumulate}
    for changes in candidates(config, first):
        try:
            changed = with_changes(config, changes)
            parts = assembly.make(estimate.without_evals(changed), source, found)
        except UserError:
            continue  # a mesh or micro-batch that does not divide evenly
        policy = changed.model.get('remat')
        least = estimate.bytes_a_device(parts.abstract)
        least += 0.7 * activations.get(policy, 0) / changed.accumulate
        if least > available:
            continue
        result = estimate.plan(changed, source, found, title, **options)
        memory = result['memory']
        say(f'tried {as_flags(changes)}: ' + estimate.verdict(memory))
        if memory['fits']:
            return changes, result
        activations[policy] = memory['activations'] * changed.accumulate
    return None, None
