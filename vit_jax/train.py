"""The loop: from a config to a trained model, and what is known of it, on disk."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vit_jax import config as configs
from vit_jax import models, objectives, optim, report, sharding, step, workdir
from vit_jax.checkpoint import Checkpoints
from vit_jax.convert import load as weights
from vit_jax.data import pipeline, sources
from vit_jax.errors import UserError


class Parts(NamedTuple):
    """What a config names, made; nothing of it depends on a workdir."""

    source: sources.Source
    steps: int
    mesh: jax.sharding.Mesh
    model: Any
    shape: tuple[int, int, int]  # of an image: H, W, C
    objective: Callable
    tx: optim.Optimizer
    abstract: step.State
    evals: dict[str, Any]


def make(config):
    """The parts of a run; every mistake in the config that can be seen beforehand is seen here."""
    source = sources.load(**config.data.source)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.data.batch_size, mesh, config.accumulate)
    classes = len(source.classes)
    model = models.build(**{**config.model, 'num_classes': config.model.num_classes or classes})
    if model.num_classes < classes:
        raise UserError(
            f'labels are out of range: data set {config.data.source.name} has {classes} classes, '
            f'model.num_classes is {model.num_classes}'
        )
    epoch = len(source) / config.data.batch_size  # in steps
    steps = config.steps or max(1, round(config.epochs * epoch))
    shape = (*pipeline.size_of(config.data.image_size), 3)
    objective = objectives.supervised(model, **config.objective)
    tx = optim.make(step.abstract_params(model, shape), steps, **config.optim)
    abstract = step.abstract_state(model, tx, shape, mesh)
    evals = {
        name: configs.EVALUATORS[kwargs.type](model, mesh, **kwargs)
        for name, kwargs in config.evals.items()
    }
    best = config.checkpoint.best
    if best is not None and best.rpartition('/')[0] not in evals:
        names = ', '.join(f'{name}/accuracy' for name in evals) or 'none without evals'
        raise UserError(f'checkpoint.best is {best!r}, no metric of an evaluation: {names}')
    return Parts(source, steps, mesh, model, shape, objective, tx, abstract, evals)


def train(config, path, stop, *, allow_config_change=False):
    """Trains in the folder `path` to the end, or until `stop` is true.

    `config` is one that `config.complete` returned. A run that left checkpoints in `path` goes on
    from the newest sound one as if it had never stopped. Returns result.json, None when stopped.
    """
    parts = make(config)
    with Checkpoints(path, **config.checkpoint) as checkpoints:
        begun = bool(checkpoints.steps())
        changes = workdir.settle_config(path, config, begun, allow_change=allow_config_change)
        result = workdir.read_json(path / 'result.json')
        if result and result['steps'] == parts.steps:
            print(f'{path} is finished: {parts.steps} steps are done.', flush=True)
            return result
        workdir.write_json(path / 'classes.json', list(parts.source.classes))
        state, account = checkpoints.resume(parts.abstract), None
        if state is None:
            state, account = first_state(config, parts)
        start = int(state.step)
        flops = parts.model.flops(parts.shape)
        batch_size = config.data.batch_size
        with report.Report(path, parts.steps, batch_size, start, flops, **config.report) as log:
            log.say(report.heading(parts, config, start))
            if account:
                log.say(f'from    {config.init_from}\n{account}')
            if changes:
                log.say(f'the config has changed:\n{workdir.table(changes)}')
            loop(config, parts, state, stop, checkpoints, log)
            if stop:
                return None
            result = log.result()
            result['expected'] = workdir.judged(config.expected, result['metrics'])
            result |= workdir.provenance()
            workdir.write_json(path / 'result.json', result)
            return result


def first_state(config, parts):
    """(the state at step 0, the account of what was loaded): random, or from `init_from`."""
    if config.init_from is None:
        fresh = (parts.model, parts.tx, parts.shape, config.seed, parts.abstract)
        return step.init(*fresh), None
    kept = ('name', 'num_classes', 'representation_size')
    fields = {k: v for k, v in models.describe(parts.model).items() if k not in kept}
    found = weights.read(
        config.init_from, image_size=parts.shape[:2], ema=None,
        num_classes=None if config.keep_head else parts.model.num_classes,
        keep_pre_logits=config.keep_pre_logits, **fields,
    )  # fmt: skip
    optim.check_same(found.params, parts.abstract.params, config.init_from)
    return step.begin(found.params, parts.tx, parts.abstract), weights.table(found.account)


def loop(config, parts, state, stop, checkpoints, log):
    """From the state to the last step, or to the next one after `stop` became true."""
    data = {k: v for k, v in config.data.items() if k != 'source'}
    advance = step.compiled(
        parts.objective, parts.tx, parts.abstract, parts.mesh, seed=config.seed,
        accumulate=config.accumulate,
    )  # fmt: skip

    def save():
        log.sync()  # raises NotFinite: what is no number is never saved
        checkpoints.save(n, state, log.history(config.checkpoint.best))

    def evaluate():
        due = {k: e for k, e in parts.evals.items() if e.due(n, parts.steps)}
        for name, evaluation in due.items():
            if n not in log.history(f'{name}/accuracy') and not stop:
                log.sync()
                with log.pause():
                    metrics = evaluation(optim.averaged(state), stop)
                if metrics is not None:
                    log.evaluation(n, name, metrics)

    n = int(state.step)
    hosts = jax.process_index(), jax.process_count()
    feed = pipeline.batches(parts.source, config.seed, n, *hosts, **data)
    try:
        evaluate()  # what an end between a save and its evaluation has left out
        while n < parts.steps and not stop:
            try:
                with log.waiting():
                    batch = next(feed)
            except UserError:  # an unreadable image, say: what was trained until then is kept
                save()
                raise
            state, metrics = advance(state, sharding.put(batch, parts.mesh))
            n += 1
            log.write(n, metrics)
            if checkpoints.due(n):
                save()
            evaluate()
        save()
    except report.NotFinite as e:
        ids = pipeline.ids(
            parts.source, batch_size=data['batch_size'], seed=config.seed, step=e.step - 1
        )
        raise e.with_examples(ids) from None
