"""The loop: from a config to a trained model, and what is known of it, on disk."""

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
    config, path, stop, at=lambda phase: None, agree=lambda facts: None, *,
    allow_config_change=False, profile=None,
):  # fmt: skip
    """Trains in the folder `path` to the end, or until `stop` is true.

    `config` is one that `config.complete` returned. A run that left checkpoints in `path` goes on
    from the newest sound one as if it had never stopped. Returns result.json, None when stopped.
    `at` is told of each phase, and `agree` of the data, as hosts.joined wants it. `profile` is
    STEP:COUNT, or None.
    """
    at('start')
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
        at('restore')
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
                loop(config, parts, state, stop, at, checkpoints, log, tracer)
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


def loop(config, parts, state, stop, at, checkpoints, log, tracer):
    """From the state to the last step, or to the next one after `stop` became true."""
    data = configs.settings_of(config.data, pipeline.batches)
    frozen = step.frozen(parts.objective, parts.mesh)
    advance = step.compiled(
        parts.objective, parts.tx, parts.abstract, parts.mesh, seed=config.seed,
        accumulate=config.accumulate,
    )  # fmt: skip

    def save():
        at(f'save, of step {n}')
        log.sync()  # raises NotFinite: what is no number is never saved
        checkpoints.save(n, state, log.history(config.checkpoint.best))

    @contextlib.contextmanager
    def saved():
        """Saves what was trained where data, a view, an evaluation or a trace ends the run."""
        try:
            yield
        except (StopIteration, report.NotFinite):
            raise
        except Exception:
            if n > begun and not stop.shared:  # others would not come to save with this process
                save()
            raise

    def evaluate():
        for name, evaluation in parts.evals.items():
            due = evaluators.is_due(config.evals[name].every, n, parts.steps)
            if due and name not in log.evaluated(n, parts.evals) and not stop:
                log.sync()
                with saved(), log.pause():
                    metrics = evaluation(optim.averaged(state), stop, at)
                if metrics is not None:
                    # After a kill in between, the line is missing and the evaluation made again.
                    checkpoints.score(n, {f'{name}/{k}': v for k, v in metrics.items()})
                    log.evaluation(n, name, metrics)

    n = begun = int(state.step)
    rows = sharding.rows(data['batch_size'], parts.mesh)
    feed = pipeline.batches(parts.source, parts.task, config.seed, n, rows, **data)
    if stop.shared:
        feed = pipeline.foreseen(itertools.islice(feed, parts.steps - n), stop)
    try:
        evaluate()  # what an end between a save and its evaluation has left out
        while n < parts.steps and not stop:
            at(f'step {n + 1}, waiting for data')
            try:
                with saved(), log.waiting():
                    batch = next(feed)
            except StopIteration:  # the same among several processes, in the first steps
                raise stop.trouble from None
            at(f'step {n + 1}' if n > begun else 'compile, of the step')
            with tracer.step(n + 1):
                batch = sharding.put(stop.within(batch), parts.mesh)
                state, metrics = advance(state, batch, frozen)
            n += 1
            log.write(n, metrics)
            with saved():
                tracer.end(n, metrics)
            if checkpoints.due(n):
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
