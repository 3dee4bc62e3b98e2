"""Evaluates a checkpoint: python -m vit_jax.evaluate --checkpoint X [--config FILE[:ARG]].

X is anything that vit_jax.load takes, or a run of any objective. The evaluations are those of the
config's section `evals` (a run's config.json is a config, too); without --config, those of the run
that made X. Any setting can be changed: --config.evals.test.batch_size=100. Of the section `model`,
only dtype, matmul_dtype, precision, quantize and unroll have an effect, as X determines the model.

A run of another objective than `supervised`, or of texts, is evaluated as during training, at the
image size of training, and its training data has to be at hand. Any other checkpoint is a
classifier, or two towers that evaluations zero_shot and retrieval compare: its position embeddings
are resized to the image size of each evaluation.

Labels of the data are matched to the checkpoint's by class name, in any order, where both have
names. A data set with some of the classes is scored among these; one with other classes is refused
unless --labels=by_number is given.

--out DIR also writes DIR/NAME.csv for each evaluation of a classifier: a line per class with its
number of images, its accuracy and how often it was predicted as each of all classes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from vit_jax import assembly, cli, evaluators, sharding
from vit_jax import config as configs
from vit_jax.assembly import restore
from vit_jax.convert import fit, run, tokenizers
from vit_jax.convert import load as weights
from vit_jax.data import tasks
from vit_jax.data.readers import names
from vit_jax.data.tokenizers import Named
from vit_jax.errors import UserError
from vit_jax.evaluators import classify
from vit_jax.io import experiment, storage
from vit_jax.io.progress import Bar
from vit_jax.io.text import number, printable, to_json
from vit_jax.models import interface
from vit_jax.models.two_towers import TwoTowers
from vit_jax.objectives import Examples, contrastive, flexible, supervised
from vit_jax.run import workdir


def evaluate(
    checkpoint: str, config: ConfigDict, ema: bool | None = None, by_class: bool = False,
    patch_size: int | None = None,
) -> Iterator[tuple[str, dict[str, float], str | None]]:  # fmt: skip
    """Runs the evaluations of a complete config: yields (name, {metric: value}, CSV of classes).

    Args:
      checkpoint: what to evaluate, as for vit_jax.load; for another objective than supervised
        classification, a run.
      config: complete config whose evaluations run.
      ema: whether to evaluate the moving average of a run's parameters. None: if the run saved one.
      by_class: whether to make the CSV, for each evaluation of the type classify; else it is None.
      patch_size: side to which the kernel of a ViT's patches is resized, in pixels. None: that of
        predictions in a run with `patch_sides`, else no change.
    """
    if not config.evals:
        raise UserError('the config has no evals')
    for name, evaluation, subject, params in evaluations(checkpoint, config, ema, patch_size):
        images = sum(map(len, evaluation.sources.values()))
        began = time.perf_counter()
        with Bar(printable(name), images, brief=True) as bar:
            metrics = evaluation(params, advance=bar.add)
        seconds = time.perf_counter() - began
        if 'examples' in metrics:
            metrics |= {'images_per_s': round(metrics['examples'] / seconds, 1)}
        text = None
        if by_class and config.evals[name].type == 'classify':
            classes = subject.names.get('classes') or evaluation.source.classes
            with Bar(f'{printable(name)} by class', images, brief=True) as bar:
                predicted = evaluation.predictions(params, bar.add)
            text = classify.by_class(predicted, classes, subject.outputs['logits'].shape[-1])
        yield name, metrics, text


def evaluations(
    checkpoint: str, config: ConfigDict, ema: bool | None, patch_size: int | None = None
) -> Iterator[tuple[str, Callable, evaluators.Subject, Any]]:
    """Yields (name, evaluation, subject, params) for each section of `evals`.

    A run of another objective, or of texts, is made as it was for training. Any other checkpoint is
    a classifier, whose positions are resized for each evaluation; no training data is read.
    """
    of_images = config.data.get('task') != 'text'
    if not (config.objective.name == 'supervised' and of_images) and run.is_run(str(checkpoint)):
        parts, params = restore.parts_and_params(str(checkpoint), config, ema)
        subject = evaluators.subject(
            parts.objective, params, parts.spec, parts.mesh, parts.task.names,
            parts.task.tokenizer,
        )  # fmt: skip
        for name, evaluation in parts.evals.items():
            yield name, evaluation, subject, params
        return
    if patch_size is None and config.objective.get('patch_sides'):
        patch_size = flexible.predicted_side(
            config.objective.patch_sides, config.objective.predict_side
        )
    mesh, loaded = sharding.make_mesh(**config.mesh), {}
    for name, settings in config.evals.items():
        if not of_images:
            raise UserError(f'evals.{name} reads texts, and {checkpoint} is no run, as it must be')
        size = tasks.size_of(settings.image_size)
        if size not in loaded:
            loaded = {size: read(checkpoint, size, config.model, ema, patch_size)}
        found = loaded[size]
        loss = found.loss or config.objective.get('loss') or 'softmax'
        subject = subject_of(found, size, mesh, loss, checkpoint)
        yield name, assembly.evaluations.make(subject, settings), subject, found.params


def subject_of(
    found: fit.Loaded, image_size: tuple[int, int], mesh: jax.sharding.Mesh, loss: str,
    checkpoint: str,
) -> evaluators.Subject:  # fmt: skip
    """Wraps a loaded classifier, or two towers, for the evaluators."""
    spec = {'image': jax.ShapeDtypeStruct((*image_size, 3), np.uint8)}
    names = {'classes': found.classes}
    if isinstance(found.model, TwoTowers):
        length = found.model.text.length
        spec['text'] = jax.ShapeDtypeStruct((length,), np.int32)
        predict = partial(contrastive.predict, found.model)
        outputs = jax.eval_shape(predict, found.params, evaluators.one_example(spec))
        fits = found.model.text.vocab_size, length
        words = Named(
            tokenizers.address_of(checkpoint), fits=fits,
            otherwise="the evaluation's setting `tokenizer` (evals.NAME.tokenizer) names one",
        )  # fmt: skip
        return evaluators.Subject(predict, mesh, outputs, names, {}, words)
    objective = supervised.supervised(found.model, Examples(spec), loss=loss)
    return evaluators.subject(objective, found.params, spec, mesh, names)


def read(
    checkpoint: str, image_size: tuple[int, int], model: ConfigDict, ema: bool | None,
    patch_size: int | None,
) -> fit.Loaded:  # fmt: skip
    """Loads the checkpoint at its sizes, with the config's dtypes, products and unroll."""
    fields = 'dtype', 'matmul_dtype', 'precision', 'quantize', 'unroll'
    how = {field: model[field] for field in fields if field in model}
    how |= {} if patch_size is None else {'patch_size': patch_size}
    found = weights.read(checkpoint, image_size=image_size, ema=ema, towers=True, **how)
    return found._replace(model=interface.exact(found.model))


def settings_of(
    path: str | None, checkpoint: str, overrides: Sequence[tuple[str, str]]
) -> ConfigDict:
    """The complete config of a file or, without one, of the run that made the checkpoint."""
    given = run.config_of(checkpoint)[1] if run.is_run(checkpoint) else None
    if path is None:
        if given is None:
            given = weights.read(checkpoint, values=False, ema=None).config
        if given is None:
            raise UserError(f'{checkpoint} is not the checkpoint of a run; give --config')
        return configs.override(given, overrides)
    has_model = given is None or given.get('model', {}).get('name') is not None
    named = any(key in ('init_from', 'model.name') for key, _ in overrides)
    if has_model and not named and not experiment.read(path).get('model', {}).get('name'):
        overrides = [*overrides, ('init_from', checkpoint)]
    return configs.load(path, overrides)


def match_labels(config: ConfigDict, labels: str) -> None:
    """Sets how labels are matched to classes in all data sets of the evaluations."""
    for kwargs in config.evals.values():
        for key in kwargs.keys() & {'source', 'train_source'}:
            for part in kwargs[key].get('mixture', {'': kwargs[key]}).values():
                part['labels'] = labels


def main(argv: Sequence[str], overrides: Sequence[tuple[str, str]]) -> None:
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f'unexpected argument {argv[1]!r}; flags begin with --')
    config = settings_of(options.config, options.checkpoint, overrides)
    if options.labels:
        match_labels(config, options.labels)
    # Fails before anything is evaluated.
    out = options.out and storage.make_folder(workdir.located(options.out))
    results, texts, ema = {}, {}, None if options.ema else False
    try:
        for name, metrics, text in evaluate(
            options.checkpoint, config, ema, bool(out), options.patch_size
        ):
            results[name] = metrics
            if text is not None:
                texts[name] = text
        results |= classify.means(results)
    finally:  # results of earlier evaluations survive one that fails
        print_results(results, options)
        write(out, texts)  # last, as the disk may be full


def write(out: epath.Path | None, texts: Mapping[str, str]) -> None:
    """Writes {name: text} as out/NAME.csv; a slash in a name makes a folder."""
    for name, text in texts.items():
        storage.write(storage.prepare_file(out / f'{name}.csv'), text.encode())


def print_results(results: Mapping[str, Mapping[str, float]], options: flags.FlagValues) -> None:
    """Prints {name: {metric: value}}, if there are any results."""
    if options.json and results:
        print(to_json({'checkpoint': options.checkpoint, **results}))
        return
    for name, metrics in results.items():
        for metric, value in metrics.items():
            print(f'{printable(name)}/{metric}  {number(value)}')


if __name__ == '__main__':
    flags.DEFINE_string(
        'checkpoint', None, 'Checkpoint to evaluate: a path, an address or a catalogue name.',
        required=True,
    )  # fmt: skip
    flags.DEFINE_string('config', None, 'Experiment file or config.json with evaluations.')
    flags.DEFINE_bool(
        'ema', True, "Evaluate the moving average of a run's parameters if it was saved, as during "
        'training.',
    )  # fmt: skip
    flags.DEFINE_integer(
        'patch_size', None, "Resize the kernel of a ViT's patches to this side, in pixels.",
        lower_bound=1, upper_bound=65_536,
    )  # fmt: skip
    flags.DEFINE_enum(
        'labels', None, list(names.BY), 'How labels of all data sets are matched with the '
        "checkpoint's: by class name (the default) or by number.",
    )  # fmt: skip
    flags.DEFINE_string('out', None, 'Folder for results by class, one CSV file per evaluation.')
    flags.DEFINE_bool('json', False, 'Print one JSON object instead of lines.')
    cli.run(main, 'config')
