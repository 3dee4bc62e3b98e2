"""Which checkpoints of a run stay: the last ones, the best one and some in between."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from etils import epath

from vit_jax.io.text import finite
from vit_jax.run import history


class Retention:
    """A preservation policy of Orbax, which knows the results of the run's evaluations.

    Args:
      workdir: workdir of the run.
      keep, keep_every, best, mode: see `checkpoint.Checkpoints`.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        keep: int,
        keep_every: int | None,
        best: str | None,
        mode: Literal['max', 'min'] | None,
    ):
        self.keep, self.keep_every, self.best, self.mode = keep, keep_every, best, mode
        self.folder = workdir / 'checkpoints'
        self.results = history.read_scores(self.folder)  # {step: {metric: value}}
        self.scores = {}  # {step: value of `best`}
        # If scores are lost, any of the checkpoints may be the best one.
        self.scores_lost = best is not None and not self.results and history.has_lost(workdir)
        self.protected = ()  # steps to keep until they have a score

    def update_scores(self, scores: Mapping[int, float]) -> None:
        """Sets the scores to those of `add_results`, replaced and extended by `scores`."""
        own = {s: values[self.best] for s, values in self.results.items() if self.best in values}
        self.scores = own | dict(scores)

    def add_results(
        self, step: int, metrics: Mapping[str, float], steps: Sequence[int]
    ) -> None:
        """Saves the results of an evaluation at `step`, and drops those of deleted checkpoints.

        `steps` are those of the checkpoints.
        """
        self.results.setdefault(step, {}).update(finite(dict(metrics)))
        newest = max(steps, default=0)  # a step that was just evaluated may be saved later
        self.results = {s: v for s, v in self.results.items() if s in steps or s >= newest}
        if jax.process_index() == 0:
            history.write_scores(self.folder, self.results)

    def drop_results_after(self, step: int) -> None:
        """Forgets results of later steps, whose evaluations run again."""
        self.results = {s: v for s, v in self.results.items() if s <= step}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which checkpoints stay; Orbax deletes the others once a new one is complete."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = steps_to_keep(
            steps, self.scores, keep=self.keep, keep_every=self.keep_every,
            largest=self.mode != 'min', protected=self.protected,
        )  # fmt: skip
        return [step in kept for step in steps]


def steps_to_keep(
    steps: Sequence[int],
    scores: Mapping[int, float],
    *,
    keep: int,
    keep_every: int | None,
    largest: bool,
    protected: Sequence[int] = (),
) -> set[int]:
    """Steps to keep: the last, the best, multiples of `keep_every`, `protected` without a score."""
    kept = set(sorted(steps)[-keep:]) | {s for s in protected if s not in scores}
    if keep_every:
        kept |= {s for s in steps if s % keep_every == 0}
    best = history.best(steps, scores, largest=largest)
    return kept if best is None else kept | {best}
