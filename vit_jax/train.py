"""The training loop: trains the model of a config, evaluates it and writes the results."""

import contextlib
import itertools

import jax

from vit_jax import assembly, evaluators, optim, sharding, step
from vit_jax import config as configs
from vit_jax.data import pipeline
from vit_jax.io.text import printable
from vit_jax.run import origin, profiling, report, workdir
from vit_jax.run.checkpoint import Checkpoints


def train(
    config, path, stop, set_phase=lambda phase: None, agree=lambda facts: None, *,
    allow_config_change=False, profile=None,
):  # fmt: skip
    """Trains in the folder `path` to the last step, or until `stop` is true.

    Resumes from the newest intact checkpoint in `path`, as if the run had never stopped.

    Args:
      config: a config that `config.complete` returned.
      path: workdir of the run.
      stop: distributed.stop.Stop.
      set_phase: called with the name of each phase as it begins, see hosts.join.
      agree: called with the facts of the data, which must be equal in all processes.
      allow_config_change: resume even if config or data differ from those of the run's start.
      profile: steps to trace, as STEP:COUNT. None: none.

    Returns:
      The contents of result.json; None if stopped.
    """
    set_phase('start')
    first = jax.process_index() == 0
    with Checkpoints(path, **config.checkpoint) as checkpoints:
        begun = bool(checkpoints.steps())
        parts = assembly.make(config, classes=assembly.kept_classes(config, path, begun))
        facts = origin.of(parts)
        agree({key: value for key, value in facts.items() if key != 'xla_flags'})
        if profile:
            profiling.parsed(profile, parts.steps)
        changes = workdir.settle_config(path, config, begun, allow_change=allow_config_change)
        result = workdir.read_result(path)
        if result and result['steps'] == parts.steps:
            print(f'{printable(path)} is finished: {parts.steps} steps are done.', flush=True)
            return result
        changes += origin.settle(path, parts, facts, begun, allow_change=allow_config_change)
        set_phase('restore')
        state, account = checkpoints.resume(parts.abstract), None
        if state is None:
            state, account = assembly.first_state(config, parts)
        start = int(state.step)
        batch_size = config.data.batch_size
        options = (path, parts.steps, batch_size, start, parts.objective.flops, stop)
        with report.Report(*options, **config.report) as log:
            log.say(report.heading(parts, config, start))
            if account:
                log.say(f'from    {config.init_from}\n{account}')
            if changes:
                log.say(f'what has changed since the run was begun:\n{workdir.table(changes)}')
            tracer = profiling.Profile(profile, path, parts.steps, start, log.say)
            with contextlib.closing(tracer):
                loop(config, parts, state, stop, set_phase, checkpoints, log, tracer)
            if stop:
                return None
            result = log.result()
            result['costs'] = report.costs(result)
            measured = result['metrics'] | result['costs']
            better = configs.better(config)
            result['expected'] = workdir.judged(config.expected, measured, better)
            result |= workdir.provenance()
            if first:
                workdir.write_json(path / 'result.json', result)
            return result


def loop(config, parts, state, stop, set_phase, checkpoints, log, tracer):
    """Trains from `state` to the last step, or to the next step after `stop` becomes true."""
    data = configs.settings_of(config.data, pipeline.batches)
    frozen = step.frozen(parts.objective, parts.mesh)
    advance = step.compiled(
        parts.objective, parts.tx, parts.abstract, parts.mesh, seed=config.seed,
        accumulate=config.accumulate,
    )  # fmt: skip

    def save():
        set_phase(f'save, of step {n}')
        log.sync()  # raises NotFinite, so that a non-finite state is never saved
        checkpoints.save(n, state, log.history(config.checkpoint.best))

    @contextlib.contextmanager
    def saved():
        """Saves the state before an error of data, view, evaluation or trace ends the run."""
        try:
            yield
        except (StopIteration, report.NotFinite):
            raise
        except Exception:
            if n > begun and not stop.shared:  # saving needs all processes, which go on here
                save()
            raise

    def evaluate():
        for name, evaluation in parts.evals.items():
            due = evaluators.is_due(config.evals[name].every, n, parts.steps)
            if due and name not in log.evaluated(n, parts.evals) and not stop:
                log.sync()
                with saved(), log.pause():
                    metrics = evaluation(optim.averaged(state), stop, set_phase)
                if metrics is not None:
                    # If the run is killed in between, the line is missing and the evaluation runs
                    # again.
                    checkpoints.add_results(n, {f'{name}/{k}': v for k, v in metrics.items()})
                    log.evaluation(n, name, metrics)

    n = begun = int(state.step)
    rows = sharding.rows(data['batch_size'], parts.mesh)
    feed = pipeline.batches(parts.source, parts.task, config.seed, n, rows, **data)
    if stop.shared:
        feed = pipeline.read_ahead(itertools.islice(feed, parts.steps - n), stop)
    try:
        evaluate()  # in case the run ended between a save and its evaluation
        while n < parts.steps and not stop:
            set_phase(f'step {n + 1}, waiting for data')
            try:
                with saved(), log.waiting():
                    batch = next(feed)
            except StopIteration:  # among several processes: stop.trouble ended the feed
                raise stop.trouble from None
            set_phase(f'step {n + 1}' if n > begun else 'compile, of the step')
            with tracer.step(n + 1):
                batch = sharding.put(stop.add_vote(batch), parts.mesh)
                state, metrics = advance(state, batch, frozen)
            n += 1
            log.write(n, metrics)
            with saved():
                tracer.end(n, metrics)
            if checkpoints.is_due(n):
                save()
            evaluate()
        save()
        if stop.trouble:
            raise stop.trouble
    except report.NotFinite as e:
        ids = pipeline.ids(
            parts.source, batch_size=data['batch_size'], seed=config.seed, step=e.step - 1,
            repeats=data['repeats'],
        )  # fmt: skip
        raise e.with_examples(ids) from None
