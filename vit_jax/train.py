"""The training loop: trains the model of a config, evaluates it and writes the results."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from vit_jax import assembly, evaluators, optim, sharding, step
from vit_jax import config as configs
from vit_jax.assembly import evaluations, initial, kept
from vit_jax.data import pipeline
from vit_jax.distributed.stop import Stop
from vit_jax.io.text import printable
from vit_jax.run import changes, heading, origin, profiling, report, results, workdir
from vit_jax.run.checkpoint import Checkpoints


def train(
    config: ConfigDict, path: epath.Path, stop: Stop,
    set_phase: Callable[[str], None] = lambda phase: None,
    agree: Callable[[Mapping[str, Any]], None] = lambda facts: None, *,
    allow_change: bool = False, profile: str | None = None,
    keep_kernels: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:  # fmt: skip
    """Trains in the folder `path` to the last step, or until `stop` is true.

    Resumes from the newest intact checkpoint in `path`, as if the run had never stopped.

    Args:
      config: a config that `config.complete` returned.
      path: workdir of the run.
      stop: ends the training once it is true.
      set_phase: called with the name of each phase as it begins, see hosts.join.
      agree: called with the facts of the data, which must be equal in all processes.
      allow_change: resume even if config or data differ from those of the run's start.
      profile: steps to trace, as STEP:COUNT. None: none.
      keep_kernels: called by process 0 before each save, see determinism.repeatable.

    Returns:
      The contents of result.json; None if stopped.
    """
    set_phase('start')
    with Checkpoints(path, **config.checkpoint) as checkpoints:
        begun = bool(checkpoints.steps())
        parts = assembly.of_run(config, path, begun, checkpoints='values')
        facts = origin.facts_of(parts)
        agree(origin.shared(facts))
        profiling.check(profile, parts.steps)
        differing = changes.record_config(
            path, config, begun, may_change=configs.may_change, allow_change=allow_change
        )
        result = workdir.read_result(path)
        if result and result['steps'] == parts.steps:
            print(f'{printable(path)} is finished: {parts.steps} steps are done.', flush=True)
            return result
        differing += origin.record_facts(path, parts, facts, begun, allow_change=allow_change)
        set_phase('restore')
        state, account = checkpoints.resume(parts.abstract), None
        if state is None:
            state, account = initial.first_state(config, parts)
        start = int(state.step)
        if parts.objective.kept is not None:
            parts = kept.filled(config, parts, state.params, path, stop, set_phase)
            if parts is None:
                return None
        sizes = (parts.steps, config.data.batch_size, start, parts.objective.flops)
        with report.Report(path, *sizes, stop, parts.objective.warn, **config.report) as log:
            log.print(heading.text(parts, config, start, account, differing))
            with profiling.Profile(profile, path, parts.steps, start, log.print) as tracer:
                loop(
                    config, parts, state, stop, set_phase, checkpoints, log, tracer, keep_kernels
                )
            if stop:
                return None
            result = results.complete(log.result(), config.expected, configs.better(config))
            if jax.process_index() == 0:
                workdir.write_json(path / 'result.json', result)
            return result


def loop(
    config: ConfigDict, parts: assembly.Parts, state: step.State, stop: Stop,
    set_phase: Callable[[str], None], checkpoints: Checkpoints, log: report.Report,
    tracer: profiling.Profile, keep_kernels: Callable[[], None],
) -> None:  # fmt: skip
    """Trains from `state` to the last step, or to the next step after `stop` becomes true."""
    frozen = step.frozen(parts.objective, parts.mesh)
    precision = config.model.get('precision')
    settings = dict(seed=config.seed, accumulate=config.accumulate, precision=precision)
    programs = step.Programs(parts.objective, parts.tx, parts.abstract, parts.mesh, **settings)

    def save():
        set_phase(f'save, of step {n}')
        log.sync()  # raises NotFinite, so that a non-finite state is never saved
        if jax.process_index() == 0:
            keep_kernels()
        checkpoints.save(n, state, log.history(config.checkpoint.best))

    def save_alone():
        if n > start and not stop.shared:  # saving needs all processes, which go on here
            save()

    def evaluate():
        for name, evaluation in parts.evals.items():
            due = evaluators.is_due(config.evals[name].every, n, parts.steps)
            if due and name not in log.evaluated(n, parts.evals) and not stop:
                log.sync()
                with save_on_error(save_alone), log.pause():
                    metrics = evaluation(optim.averaged(state), stop, set_phase)
                    evaluations.check_measured(config.checkpoint.best, name, metrics)
                if metrics is not None:
                    # If the run is killed in between, the evaluation runs again.
                    checkpoints.add_results(n, {f'{name}/{k}': v for k, v in metrics.items()})
                    log.write_evaluation(n, name, metrics)

    n = start = int(state.step)
    feed = batches(config, parts, start, stop)
    try:
        evaluate()  # in case the run ended between a save and its evaluation
        while n < parts.steps and not stop:
            set_phase(f'step {n + 1}, waiting for data')
            try:
                with save_on_error(save_alone), log.waiting():
                    batch = next(feed)
            except StopIteration:  # among several processes: stop.trouble ended the feed
                raise stop.trouble from None
            train_step, new = programs.of(n)
            set_phase('compile, of the step' if new else f'step {n + 1}')
            with tracer.step(n + 1):
                batch = sharding.put(stop.add_vote(batch), parts.mesh)
                state, metrics = train_step(state, batch, frozen)
            n += 1
            log.write(n, metrics)
            with save_on_error(save_alone):
                tracer.end(n, metrics)
            if checkpoints.is_due(n):
                save()
            evaluate()
        save()
        if stop.trouble:
            raise stop.trouble
    except report.NotFinite as e:
        raise e.with_examples(assembly.example_ids(config, parts, e.step)) from None


def batches(
    config: ConfigDict, parts: assembly.Parts, start: int, stop: Stop
) -> Iterator[dict[str, Any]]:
    """The batches from step `start` on; among several processes, up to the last step."""
    data = configs.settings_of(config.data, pipeline.batches)
    rows = sharding.rows(data['batch_size'], parts.mesh)
    feed = pipeline.batches(parts.source, parts.task, config.seed, start, rows, **data)
    if not stop.shared:
        return feed
    return pipeline.read_ahead(itertools.islice(feed, parts.steps - start), stop)


@contextlib.contextmanager
def save_on_error(save: Callable[[], None]) -> Iterator[None]:
    """Calls `save` before an error of data, view, evaluation or trace ends the run."""
    try:
        yield
    except (StopIteration, report.NotFinite):
        raise
    except Exception:
        save()
        raise
