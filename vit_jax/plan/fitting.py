"""Searches for settings with which a run fits into memory, by compiling it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax import assembly
from vit_jax import config as configs
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.plan import estimate

# Share of the model's arithmetic that a policy recomputes, in equivalent time: it orders the
# search and predicts nothing. The second policy recomputes attention, the third the forward pass.
REMAT = {'none': 0.0, 'dots_with_no_batch_dims_saveable': 0.12, 'full': 1 / 3}


def extra_seconds(
    config: ConfigDict, plan: Mapping[str, Any], policy: str | None, fsdp: int, accumulate: int
) -> float:
    """Approximate extra time of a step: weight gathers, recomputation, accumulated gradients.

    `plan` is that of `config` unchanged; `policy`, `fsdp` and `accumulate` are the changed settings
    model.remat, mesh.fsdp and accumulate.
    """
    peaks, count = plan['peaks'], plan['parameters']
    flops = 3 * (plan['forward_flops'] or 0) * config.data.batch_size / plan['devices']
    links = 1 if fsdp < 4 else 2
    gathers = accumulate * 3 * 2 * count * (fsdp - 1) / fsdp / (links * peaks['link'])
    recomputation = REMAT.get(policy, 0) * flops / peaks['flops']
    accumulation = (accumulate - 1) * 8 * count / fsdp / peaks['bandwidth']
    return gathers + 2 * recomputation + accumulation


def candidates(config: ConfigDict, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Changes of settings that reduce memory, cheapest first: [{'mesh.fsdp': 8, ...}]."""
    rows = []
    remat, degree, parts = config.model.get('remat'), config.mesh.fsdp, config.accumulate
    policies = [None] if remat is None else [p for p in REMAT if REMAT[p] >= REMAT[remat]]
    for policy in policies:
        for fsdp in (degree * 2**k for k in range(11)):
            for accumulate in (parts * 2**k for k in range(6)):
                changes = {}
                if policy != remat:
                    changes['model.remat'] = policy
                if fsdp > degree:
                    changes |= {'mesh.data': -1} if config.mesh.data != -1 else {}
                    changes['mesh.fsdp'] = fsdp
                if accumulate > parts:
                    changes['accumulate'] = accumulate
                if changes and fsdp * config.mesh.tensor <= plan['devices']:
                    cost = extra_seconds(config, plan, policy, fsdp, accumulate)
                    rows.append((cost, len(rows), changes))
    return [changes for *_, changes in sorted(rows, key=lambda row: row[:2])]


def with_changes(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with changes {dotted key: value}; raises UserError for an invalid one."""
    return configs.override(config.to_dict(), [(k, str(v)) for k, v in changes.items()], config)


def as_flags(changes: Mapping[str, Any]) -> str:
    """Changes {dotted key: value} as flags of the command line."""
    return ' '.join(f'--config.{key}={value}' for key, value in changes.items())


def fit(
    config: ConfigDict, source: sources.Source, target_devices: Sequence[Any], title: str,
    first: Mapping[str, Any], log: Callable[[str], None], **options: Any,
) -> tuple[dict[str, Any], dict[str, Any]] | tuple[None, None]:  # fmt: skip
    """Returns (changes that fit, their plan), or (None, None); `options` are of `estimate.plan`.

    Candidates that cannot fit are not compiled: those whose state exceeds the memory, or whose
    activations would have to shrink more than the micro-batch.

    Args:
      config, source, target_devices, title: as in `estimate.plan`.
      first: the plan without changes.
      log: receives a line about each candidate that is compiled.
    """
    memory = first['memory']
    available = memory['available']
    activations = {config.model.get('remat'): memory['activations'] * config.accumulate}
    for changes in candidates(config, first):
        try:
            changed = with_changes(config, changes)
            parts = assembly.make(estimate.without_evals(changed), source, target_devices)
        except UserError:
            continue  # a mesh or micro-batch that does not divide evenly
        policy = changed.model.get('remat')
        minimum = estimate.bytes_per_device(parts.abstract)
        minimum += 0.7 * activations.get(policy, 0) / changed.accumulate
        if minimum > available:
            continue
        result = estimate.plan(changed, source, target_devices, title, **options)
        memory = result['memory']
        log(f'tried {as_flags(changes)}: ' + estimate.verdict(memory))
        if memory['fits']:
            return changes, result
        activations[policy] = memory['activations'] * changed.accumulate
    return None, None
