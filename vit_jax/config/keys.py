"""Settings that are arguments of no other function. Only the signatures and docstrings are used."""

from typing import Annotated

from vit_jax.io.bounds import Finite, MayChange, NonNegative, Positive, Seed, Steps


def scalars(
    *,
    seed: Seed = 0,
    steps: Steps | None = None,
    epochs: Positive[float] | None = None,
    accumulate: Positive[int] = 1,
    init_from: str | None = None,
    keep_head: bool = False,
    keep_pre_logits: bool = False,
    expected: Annotated[tuple[dict, ...], MayChange()] = (),
) -> None:
    """The keys outside of sections. Either `steps` or `epochs` is given.

    Args:
      seed: seed of the initial parameters, the order of the examples, augmentation and dropout.
      steps: length of the run in updates of the parameters.
      epochs: length of the run in passes over the training data.
      accumulate: micro-batches that a batch is split into. Their gradients are averaged, which
        takes less memory than the whole batch.
      init_from: checkpoint to begin training from: anything that `vit_jax.load` takes, of which the
        encoder is used. The head starts at zero, and a representation layer is left out.
      keep_head: whether to keep the head of `init_from`, and its representation layer.
      keep_pre_logits: whether to keep the representation layer of `init_from`.
      expected: results that the run is judged by, see below.
    """


def expectation(
    *,
    metric: str,
    value: Finite[float],
    tolerance: NonNegative[float],
    source: str,
    cell: tuple[str, tuple[str | Finite[float], ...], str] | None = None,
    scale: Positive[float] = 1.0,
) -> None:
    """A row of `expected`: the value that a metric should reach.

    Args:
      metric: name of the metric, as in result.json: 'test/accuracy'.
      value: what the metric should be.
      tolerance: largest difference from `value` with which the run passes.
      source: where the value is from, such as a paper and its table.
      cell: where the value stands in a published table of `python -m vit_jax.tables`: (table,
        first cells of the row, column).
      scale: factor from the number in the published table to `value`: 0.01 for percent.
    """


def model(*, name: str | None = None, num_classes: Positive[int] | None = None) -> None:
    """The network. Other keys depend on its kind.

    Args:
      name: kind, size and patch of the model, such as 'vit-b/16', 'r50+vit-b/16', 'mixer-b/16' or
        'bit-r50x1'. None: the model of the checkpoint `init_from`.
      num_classes: outputs of the head. None: as many as the data set has classes.
    """


def data(*, source: dict, task: str = 'classify') -> None:
    """The examples to train on. Other keys depend on the task.

    Args:
      source: the data set, see below.
      task: what an example is: one of the package's tasks, or your own as FILE.py:FUNCTION.
    """


def mixture_part(*, weight: Positive[float] = 1.0) -> None:
    """The key of a data set in a mixture, beside its own.

    Args:
      weight: share of the examples that come from this data set, relative to the other weights.
    """


def objective(*, name: str = 'supervised') -> None:
    """The training method, which other keys depend on.

    Args:
      name: training method: one of the package's, or your own as FILE.py:FUNCTION.
    """


def evaluation(*, type: str = 'classify', every: NonNegative[int] = 0) -> None:
    """One section for each evaluation, `evals.NAME`. Its metrics are called 'NAME/METRIC'.

    Other keys depend on the type.

    Args:
      type: what is measured: one of the package's evaluators, or your own as FILE.py:FUNCTION.
      every: steps between two evaluations. 0: one evaluation, at the end of the run.
    """


def select(
    *,
    metric: str,
    grid: tuple[dict, ...] = (),
    split: str | None = None,
    evals: dict | None = None,
    development: bool = False,
) -> None:
    """How `bash launch.sh COMMAND --select` chooses settings of the run; the section may be absent.

    It trains a development run for each point of the grid and then, with the settings of the best,
    the final run. Without `split` and `evals` the best run of the grid is the result itself. Any
    other command trains one run, with the settings as they are, and ignores this section.

    Args:
      metric: what the best run is best in, such as 'val/accuracy'. Of equal runs the one of the
        earlier point is chosen, so of rates in ascending order the smallest.
      grid: points, each a dict of settings by dotted key: {'optim.lr': 0.003, 'steps': 500}. The
        key `arg`, beside no other, is another argument of the experiment file. Empty: --sweep gives
        the grid.
      split: split of `data.source` that development runs train on. None: that of the final run.
      evals: evaluations of development runs in place of the section `evals`. None: that section.
      development: whether this run is a development run: it has their split and evaluations, and
        expects nothing.
    """
