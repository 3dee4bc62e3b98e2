"""Schedules of the learning rate."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError

Schedule = Literal['cosine', 'linear', 'poly', 'rsqrt', 'constant', 'step']
ENDS = ('cosine', 'linear', 'poly')  # schedules that reach end_lr


def make_schedule(
    steps: int,
    *,
    lr: float,
    schedule: Schedule = 'cosine',
    end_lr: float = 0.0,
    power: float = 0.9,
    timescale: int = 10_000,
    boundaries: tuple[float, ...] = (),
    step_factor: float = 0.1,
    warmup: int = 0,
    cooldown: int = 0,
) -> optax.Schedule:
    """Makes a schedule, step -> learning rate: linear warm-up, decay, linear cool-down.

    Args:
      steps: length of the run in updates.
      lr: peak learning rate.
      schedule: decay of the learning rate after the warm-up. cosine, linear and poly reach end_lr
        at the last step, poly as the power of the share of steps that is left (arXiv:1606.00915
        section 4.1.1); rsqrt is 1 / sqrt(1 + t / timescale), t steps after the warm-up
        (arXiv:2106.04560 section 3.5); step falls at the boundaries.
      end_lr: learning rate at which the schedules cosine, linear and poly end.
      power: exponent of the schedule poly.
      timescale: time constant of the schedule rsqrt, in steps.
      boundaries: shares of all steps, the warm-up included, after which the schedule step
        multiplies the learning rate by step_factor. (0.3, 0.6, 0.9) is that of fine-tuning in
        arXiv:1912.11370.
      step_factor: factor of the learning rate at each of the boundaries.
      warmup: steps in which the learning rate rises linearly from 0.
      cooldown: steps at the end in which the learning rate also falls linearly to 0.

    Raises:
      UserError: warm-up and cool-down exceed `steps`, or the schedule step has no boundaries.
    """
    if warmup + cooldown > steps:
        raise UserError(f'optim.warmup {warmup} + optim.cooldown {cooldown} exceed {steps} steps')
    if schedule == 'step' and not boundaries:
        raise UserError(
            "optim.schedule 'step' needs optim.boundaries: shares of all steps, (0.3, 0.6, 0.9)"
        )
    last = [round(share * steps) for share in boundaries]  # the last steps at their rates

    def rate(step):
        after = jnp.maximum(jnp.asarray(step, jnp.float32) - warmup, 0)
        progress = jnp.minimum(after / max(steps - warmup, 1), 1)
        value = {
            'cosine': lambda: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            'linear': lambda: 1 - progress,
            'poly': lambda: (1 - progress) ** power,
            'rsqrt': lambda: jax.lax.rsqrt(1 + after / timescale),
            'constant': lambda: jnp.float32(1),
            'step': lambda: step_factor ** jnp.sum(step > jnp.array(last)),
        }[schedule]()
        if end_lr and schedule in ENDS:
            value = end_lr / lr + (1 - end_lr / lr) * value
        if warmup:
            value *= jnp.minimum(step / warmup, 1)
        if cooldown:
            value *= jnp.clip((steps - step) / cooldown, 0, 1)
        return lr * value

    return rate
