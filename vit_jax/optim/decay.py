"""Weight decay by name, and the choice of parameters by patterns."""

import re
from collections.abc import Collection, Iterable, Mapping

import jax.numpy as jnp
import optax

from vit_jax.errors import UserError
from vit_jax.models.parameters import map_by_name


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the regular expressions is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def check_patterns(
    setting: str, patterns: Iterable[str], names: Collection[str], which: str = ''
) -> None:
    """Raises UserError, naming the setting, for a pattern that is found in none of the names."""
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f'optim.{setting} {pattern!r} matches no parameter{which}')


def decay_strengths(
    names: Collection[str],
    frozen: Collection[str],
    weight_decay: float,
    decay: tuple[str, ...] | str,
    decay_factors: tuple[tuple[str, float], ...],
) -> dict[str, float]:
    """{name: strength of the weight decay} of all parameters, 0 where it does not apply.

    Args:
      names: names of the parameters.
      frozen: names of the frozen ones, which do not decay.
      weight_decay: strength of the weight decay. `wd` of big_vision, which the schedule scales
        and the base rate does not, is weight_decay * lr.
      decay: patterns of the parameters that weight decay applies to.
      decay_factors: (pattern, factor) pairs; the first pattern found in the name of a parameter
        that decays multiplies its strength. (('^head/', 100.0),) is that of arXiv:2106.04560
        section 3.1.

    Raises:
      UserError: a pattern matches no parameter, or no parameter that decays.
    """
    decay = (decay,) if isinstance(decay, str) else decay
    check_patterns('decay', decay, names)
    decayed = [name for name in names if matches(decay, name)]
    patterns = [pattern for pattern, _ in decay_factors]
    check_patterns('decay_factors', patterns, decayed, ' that optim.decay matches')
    factors = {
        name: next((f for pattern, f in decay_factors if re.search(pattern, name)), 1.0)
        for name in decayed
    }
    return {
        name: 0.0 if name in frozen else weight_decay * factors.get(name, 0.0) for name in names
    }


def decay_factor(
    steps: int, weight_decay: float, weight_decay_end: float | None
) -> optax.Schedule | None:
    """Schedule of the factor of all strengths, step -> factor; None if they are constant.

    Args:
      steps: length of the run in updates.
      weight_decay: strength of the weight decay in the first update.
      weight_decay_end: strength that it approaches by half a cosine over the run (arXiv:2104.14294
        section 3.2). None: it is constant.

    Raises:
      UserError: weight_decay_end is given, and weight_decay is 0.
    """
    if weight_decay_end is None:
        return None
    if not weight_decay:
        raise UserError(
            f'optim.weight_decay_end is {weight_decay_end}, but optim.weight_decay, from which the '
            'schedule goes there, is 0'
        )
    end = weight_decay_end / weight_decay

    def factor(step):
        progress = jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1)
        return end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return factor


def add_decays(
    strengths: Mapping[str, float], factor: optax.Schedule | None = None
) -> list[optax.GradientTransformation]:
    """Transformations that add strength * parameter to updates, one for each strength above 0.

    `factor` of the step multiplies the strengths.
    """

    def add(strength):
        chosen = {name for name in strengths if strengths[name] == strength}
        return optax.add_decayed_weights(
            strength if factor is None else lambda step: strength * factor(step),
            mask=lambda tree: map_by_name(lambda name, _: name in chosen, tree),
        )

    return [add(strength) for strength in sorted({*strengths.values()} - {0.0})]
