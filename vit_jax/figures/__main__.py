"""Draws a run or a checkpoint: python -m vit_jax.figures X [--images FILE,...] [--out DIR].

X is anything that vit_jax.load accepts, or a folder of runs. Writes PNGs into DIR (default: the
workdir of the run), and page.html, a self-contained page with all of them, the settings, costs and
versions.

For a run, from its newest checkpoint: summary.png (loss and accuracy, worst mistakes, attention of
the class token), curves.png and confusion.png; for one of segmentation or detection worst.png, its
worst images beside the truth. For any model, as in arXiv:2010.11929 figures 6, 7 and 14:
filters.png, positions.png and, for the images, distance.png, rollout.png, heads.png and the
predictions. For a ViT and label maps, those of the run or of --masks EXPERIMENT: features.png,
principal components of patches. For a folder with runs that start from others in it: images.png and
compute.png, accuracy against the size and compute of their pre-training (figures 3 to 5). For a
folder with runs that differ in augmentation and regularization: grid.png, as in arXiv:2106.10270
figure 4. For a folder with probed runs of several training methods: methods.png.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from vit_jax import assembly, cli, models, optim
from vit_jax import config as configs
from vit_jax.convert import load as weights
from vit_jax.convert import run
from vit_jax.convert.fit import Loaded
from vit_jax.data import files, mixture, reading, sources
from vit_jax.data.tasks import classify as classify_task
from vit_jax.errors import Damaged, UserError
from vit_jax.evaluators import classify
from vit_jax.evaluators.detect import Detect
from vit_jax.evaluators.panoptic import Panoptic
from vit_jax.evaluators.segment import Segment
from vit_jax.figures import features, model_page, page, plates, study_page, summary, worst
from vit_jax.io import storage
from vit_jax.io.progress import Bar
from vit_jax.io.text import number, printable
from vit_jax.models import interface
from vit_jax.models.parameters import named_leaves
from vit_jax.run import changes, checkpoint, history, results, workdir
from vit_jax.step import State

ATTENDED = 4  # images with an attention map
MOST_CONFUSED = 200  # classes in a confusion matrix that is drawn
MOST_FREQUENT = 20  # pairs of classes in the table of mistakes


class Images(Sequence):
    """Examples of a data set as model inputs, read on access."""

    def __init__(
        self, source: sources.Source, ids: np.ndarray, view: Any, image_size: int | Sequence[int]
    ) -> None:
        self.ids = ids
        task = classify_task.classify(source, view=view, image_size=image_size)
        self.read = partial(reading.example, source=source, task=task)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read(int(self.ids[i]), np.random.default_rng(0))['image']


def of_run(path: epath.Path, out: epath.Path) -> Iterator[page.Part]:
    """Draws a run from its newest checkpoint; yields the parts of its page (see `page`)."""
    config = configs.complete(workdir.read_json(path / 'config.json'))
    parts = assembly.of_run(config, path, begun=True)
    try:
        state = checkpoint.restore_newest(path, parts.abstract)
    except Damaged as e:
        raise UserError(f'the newest checkpoint of {path} is damaged: {e}') from e
    if state is None:
        raise UserError(f'{path} has no checkpoint yet')
    lines = history.read_lines(path)
    result = workdir.read_result(path) or {}
    last = {k: v for line in lines for k, v in line.items() if '/' in k}
    values = [(k, number(v)) for k, v in (result.get('metrics') or last).items() if '/' in k]
    yield 'Results', f'At step {int(state.step):,}.', [('metric', 'value'), *values]
    if result.get('expected'):
        yield 'Expected', 'The numbers that the recipe reproduces.', [
            ('metric', 'expected', 'measured', '', 'source'),
            *((row['metric'], f'{row["value"]} \N{PLUS-MINUS SIGN} {row["tolerance"]}',
               '' if row['measured'] is None else number(row['measured']),
               results.VERDICTS[row['pass']], row['source']) for row in result['expected']),
        ]  # fmt: skip
    placed = {n: e for n, e in parts.evals.items() if isinstance(e, (Segment, Panoptic, Detect))}
    for name, evaluation in list(placed.items())[:1]:
        params = optim.averaged(state)
        yield from worst.parts(name, evaluation, params, out)
    classifying = {n: e for n, e in parts.evals.items() if config.evals[n].type == 'classify'}
    if classifying and parts.model is not None and 'image' in parts.inputs:
        yield from of_predictions(
            config, parts, *next(iter(classifying.items())), state, lines, out
        )
    if plates.curves(out / 'curves.png', lines):
        yield 'Curves', 'All metrics over the steps; evaluations have markers.', (
            out / 'curves.png')


def of_predictions(
    config: ConfigDict,
    parts: assembly.Parts,
    name: str,
    evaluation: classify.Classify,
    state: State,
    lines: Sequence[Mapping],
    out: epath.Path,
) -> Iterator[page.Part]:
    """Draws the predictions of a run's first evaluation; yields the parts of its page."""
    params = optim.averaged(state)
    names = named_leaves(params)
    alone = '' in run.prefixes(parts.model, parts.inputs['image'].shape[:2], names)
    with Bar(printable(name), len(evaluation.source), brief=True) as bar:
        found = evaluation.predictions(params, bar.add)
    found['label'] = classify.one_label(found['label'], found['prediction'])
    images = Images(
        evaluation.source, found['id'], config.evals[name].view, config.evals[name].image_size
    )
    order = summary.mistakes_first(found['label'], found['prediction'], found['confidence'])
    attended = np.stack([images[i] for i in order[:ATTENDED]])
    summary.draw(
        out / 'summary.png',
        evaluation=name, title=f'{config.model.name} on {mixture.title(config.data.source)}, '
        f'step {int(state.step):,}',
        lines=lines, images=images, labels=found['label'],
        predictions=found['prediction'], confidences=found['confidence'],
        classes=evaluation.source.classes, attended=attended,
        attention=model_page.attention_over(parts.model, params, attended) if alone else None,
    )  # fmt: skip
    yield 'Summary', f'The evaluation {name}.', out / 'summary.png'
    yield from of_mistakes(found, evaluation.source.classes, parts.model.num_classes, out)


def of_mistakes(
    found: Mapping[str, np.ndarray], classes: Sequence[str], count: int, out: epath.Path
) -> Iterator[page.Part]:
    """Draws the confusion matrix of a model's `count` classes if they are few.

    Yields parts of the page: the picture and a table of the most frequent mistakes.
    """
    label, prediction = found['label'], found['prediction']
    names = [classify.class_name(classes, i) for i in range(count)]
    if count <= MOST_CONFUSED:
        plates.confusion(
            out / 'confusion.png', classify.confusion(label, prediction, count), names
        )
        yield 'Confusion', 'Predictions for each true class (row), in percent.', (
            out / 'confusion.png')
    known = label >= 0
    images = np.bincount(label[known], minlength=count)
    wrong = known & (label != prediction)
    pairs, times = np.unique(label[wrong] * count + prediction[wrong], return_counts=True)
    often = np.argsort(-times, kind='stable')[:MOST_FREQUENT]
    rows = [(*divmod(int(pairs[i]), count), int(times[i])) for i in often]
    if not rows:
        return
    yield 'Most frequent mistakes', 'Of all images of the true class.', [
        ('true class', 'predicted', 'times', 'of'),
        *((names[i], names[j], f'{n:,}', f'{images[i]:,}') for i, j, n in rows),
    ]  # fmt: skip


def of_records(path: epath.Path) -> Iterator[page.Part]:
    """Yields the parts of a run's page without a picture: costs, versions and settings."""
    result = workdir.read_result(path)
    if result:
        names = ('seconds', 'images_per_s', 'examples_seen', 'device_kind', 'device_count')
        costs = results.costs(result) | {name: result.get(name) for name in names}
        yield 'Costs', 'exaFLOPs: three forward passes an image (arXiv:2010.11929 table 6).', [
            ('', ''), *((k, page.format_value(v)) for k, v in costs.items())]
        versions = result.get('versions', {})
        versions |= {k: result.get(k) for k in ('git_commit', 'finished')}
        yield 'Versions', 'Of the process that ended the run.', [('', ''), *versions.items()]
    settings = changes.flatten(workdir.read_json(path / 'config.json'))
    yield 'Settings', 'All keys of the config; --config.KEY=VALUE changes one.', [
        ('key', 'value'), *((k, page.format_value(v)) for k, v in settings.items())]


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2:
        raise UserError('usage: python -m vit_jax.figures X [--images FILE,...] [--out DIR]')
    options = flags.FLAGS
    path, step = run.split_address(argv[1]) if run.is_run(argv[1]) else (None, None)
    is_run = path is not None and step is None  # not one of its checkpoints
    is_folder = path is None and os.path.isdir(argv[1])
    runs = workdir.finished([argv[1]]) if is_folder else []
    if not is_run and not options.out:
        raise UserError(
            f'{argv[1]} is not the workdir of a run; give --out, a folder for the pictures'
        )
    out = workdir.located(options.out or path)
    paths = files.find_images(split_names(options.images), skip=out)
    storage.make_folder(out)  # fails before anything is computed
    title, image_results = argv[1], None
    if runs:
        stages = [study_page.of_study(runs, out)]
    elif (found := model_of(argv[1], is_run, options.image_size)) is None:
        if paths:
            raise UserError(f'--images: no model of {argv[1]} takes them')
        stages = []
    else:
        name = name_of(found)
        title = f'{name}: {title}'
        stages = [model_page.of_model(found, out)]
        if paths:
            interface.check_output(found.model)
            drawn = model_page.choose(paths, options.max_images)
            if len(drawn) < len(paths):
                print(f'{len(drawn)} of {len(paths):,} images are drawn; --max_images=N draws more')
            image_results = model_page.ImageResults(found, drawn)
            stages.append(image_results.parts(out))
        if labelled := features.data_set_of(argv[1], path if is_run else None, options.masks):
            stages.append(features.parts(found, *labelled, out))
        stages.append([model_page.of_fields(found, name)])
    if is_run:
        stages = [of_run(path, out), *stages, of_records(path)]
    parts = []
    for part in itertools.chain(*stages):
        parts.append(part)
        if isinstance(part[-1], os.PathLike):
            print(f'Picture: {printable(part[-1])}', flush=True)
    text = page.document(title, 'Drawn by python -m vit_jax.figures.', parts)
    storage.write(out / 'page.html', text.encode())
    print(f'Page: {printable(out / "page.html")}')
    if image_results and image_results.failed:
        raise UserError(f'{image_results.failed} of {len(drawn)} images cannot be read')


def model_of(address: str, is_run: bool, image_size: int | None) -> Loaded | None:
    """Loads a checkpoint; None for a run of texts, or of a method without a model of images."""
    try:
        found = weights.read(address, image_size=image_size, as_input=True)
        interface.check_reads_images(found.model)
        return found
    except UserError as e:
        config = run.config_of(address)[1] if is_run else {}
        classifies = config.get('objective', {}).get('name', 'supervised') == 'supervised'
        if classifies and config.get('data', {}).get('task') != 'text':
            raise
        print(printable(f'No pictures of a model: {e}'))
        return None


def split_names(texts: Sequence[str]) -> list[str]:
    """Splits texts at commas into names; an existing path is one name, commas included."""
    names = []
    for text in texts:
        exists = os.path.exists(os.path.expanduser(text))
        names += [text] if exists else [name for name in text.split(',') if name]
    return names


def name_of(found: Loaded) -> str:
    """Name of a model in its run's config, else the shortest name that builds it."""
    model = (found.config or {}).get('model')
    name = model.get('name') if isinstance(model, dict) else None
    return name if isinstance(name, str) else models.describe(found.model)['name']


if __name__ == '__main__':
    flags.DEFINE_string('out', None, 'Folder for the pictures. Default: the workdir.')
    flags.DEFINE_multi_string(
        'images', [], 'Images for predictions and attention maps: files, folders or addresses, '
        'separated by commas',
    )  # fmt: skip
    flags.DEFINE_integer(
        'max_images', 16, 'Number of these images to draw at most, evenly spaced.',
        lower_bound=1, upper_bound=100,
    )  # fmt: skip
    flags.DEFINE_string(
        'masks', None, 'Experiment with label maps (data.task segment), beside which features of '
        'patches are drawn. Default: those of the run, if it has any.',
    )  # fmt: skip
    flags.DEFINE_integer(
        'image_size', None, "Image size in pixels. Default: the checkpoint's.", lower_bound=1,
        upper_bound=65_536,
    )  # fmt: skip
    cli.run(main)
