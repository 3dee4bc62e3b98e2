"""Shows what a step trains on: python -m vit_jax.data --config FILE[:ARG] --step N --show out.png.

Draws the batch of step N (0 is the first) of an experiment, or of a run's config.json, as the model
receives it: after view, augmentations, mixup and CutMix with that step's random keys. Prints the
id, name and labels of each example. Label maps, masks and boxes are drawn over their images, with
the names of the classes; then labels are shares of the pixels, or numbers of objects. Captions are
what the tokens of the step say. Makes no model and trains nothing. Any setting can be changed, as
in --config.data.view=central.
"""

import functools
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from vit_jax import assembly, cli
from vit_jax import config as configs
from vit_jax.data import mixture, overlays, pipeline, tasks
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.text import printable, to_json
from vit_jax.objectives import losses, supervised

KINDS = ('png', 'pdf', 'svg')


def model_inputs(
    config: ConfigDict, source: Source, step: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Computes (batch of a step, images float32 [B, H, W, 3] in 0 to 255, label weights [B, K])."""
    if (config.data.task, config.objective.name) != ('classify', 'supervised'):
        raise UserError(
            f'a batch of task {config.data.task} and objective {config.objective.name} has no '
            'picture here; segment, detect, image_text, and classify with supervised have'
        )
    data = configs.settings_of(config.data, pipeline.batches)
    task = assembly.task_of(config, source)
    batch = next(pipeline.batches(source, task, config.seed, step, **data))
    model = assembly.model_of(config, task)
    classes = model.num_classes
    options = configs.settings_of(config.objective, supervised.model_inputs)
    see = jax.jit(functools.partial(supervised.model_inputs, model=model, **options))
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    images = np.zeros(batch['image'].shape, np.float32)
    weights = np.zeros((len(images), classes), np.float32)
    parts = config.accumulate
    for i in range(parts):
        micro = {k: jnp.asarray(v[i::parts]) for k, v in batch.items()}
        own = key if parts == 1 else jax.random.fold_in(key, i)
        seen, labels = see(micro, own)
        mean, std = np.array(model.mean), np.array(model.std)
        images[i::parts] = 255 * (np.asarray(seen) * std + mean)
        weights[i::parts] = losses.targets(labels, classes)
    return batch, images, weights


def rows(
    batch: Mapping[str, np.ndarray], weights: np.ndarray, source: Source, count: int
) -> Iterator[dict]:
    """Yields the place, id, name, labels and use of each example of the batch, as dicts."""
    for k in range(min(count, len(weights))):
        labels = {
            source.classes[c] if c < len(source.classes) else str(c): round(float(weights[k, c]), 4)
            for c in np.argsort(-weights[k], kind='stable')
            if weights[k, c] > 0
        }
        i = int(batch['id'][k])
        yield dict(
            place=k, id=i, name=source.name(i), labels=labels, used=bool(batch['mask'][k])
        )


def picture(name: str, force: bool) -> tuple[pathlib.Path, str]:
    """Checks (path, format) of the picture to write, in an existing folder; raises UserError."""
    path = pathlib.Path(name).expanduser().absolute()
    kind = path.suffix[1:].lower()
    if storage.is_remote(name) or kind not in KINDS:
        raise UserError(f'--show={name}: name a {", ".join(KINDS)} file of this machine')
    if not path.parent.is_dir():
        raise UserError(f'--show={name}: there is no such folder')
    storage.prepare_file(path)
    storage.check_free(path, force)
    return path, kind


def annotated(
    config: ConfigDict, source: Source, task: tasks.Task, step: int, count: int
) -> tuple[list[overlays.Picture], list[dict]]:
    """(pictures, what `rows` yields) of a batch of images with label maps or boxes."""
    data = configs.settings_of(config.data, pipeline.batches)
    batch = next(pipeline.batches(source, task, config.seed, step, **data))
    pictures, lines, names = [], [], task.names['classes']
    for k in range(min(count, len(batch['id']))):
        one = {key: value[k] for key, value in batch.items()}
        labels, i = overlays.contents(one, names), int(one['id'])
        pictures.append(overlays.picture(one, names))
        lines.append(
            dict(place=k, id=i, name=source.name(i), labels=labels, used=bool(one['mask']))
        )
    return pictures, lines


def captioned(
    config: ConfigDict, source: Source, task: tasks.Task, step: int, count: int
) -> tuple[list[overlays.Picture], list[dict]]:
    """(pictures, what `rows` yields) of a batch of texts; without pictures for texts alone."""
    data = configs.settings_of(config.data, pipeline.batches)
    batch = next(pipeline.batches(source, task, config.seed, step, **data))
    lines, tokenizer = [], task.tokenizer.loaded
    for k in range(min(count, len(batch['id']))):
        i = int(batch['id'][k])
        labels = {tokenizer.decode(batch['text'][k]): 1}
        used = bool(batch['mask'][k])
        lines.append(dict(place=k, id=i, name=source.name(i), labels=labels, used=used))
    return [overlays.Picture(image) for image in batch.get('image', ())], lines


def draw(
    path: pathlib.Path,
    kind: str,
    pictures: Sequence[overlays.Picture],
    examples: Sequence[Mapping],
    title: str,
    names: Sequence[str] = (),
) -> None:
    """Draws a grid of pictures with ids and labels above, to a file of a format.

    `examples` are what `rows` yields, `names` those of the classes of boxes and label maps.
    """
    try:
        from matplotlib.figure import Figure

        from vit_jax.figures import overlaid
        from vit_jax.figures.style import shorten
    except ModuleNotFoundError as e:
        raise UserError('--show needs matplotlib: pip install "vit_jax[figures]"') from e
    side, most = (3.0, 5) if names else (1.9, 8)
    columns = min(most, len(examples))
    lines = -(-len(examples) // columns)
    figure = Figure((side * columns, (side + 0.3) * lines + 0.5), layout='constrained')
    for k, axis in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        axis.axis('off')
        if k < len(examples):
            labels = examples[k]['labels'].items()
            words = [name if w == 1 else f'{name} {w:.2f}' for name, w in list(labels)[:2]]
            words += ['...'] if len(labels) > 2 else []
            words = [] if names else words
            words = words if examples[k]['used'] else ['not used']
            axis.imshow(pictures[k].image, interpolation='nearest')
            words = [str(examples[k]['id']), *(shorten(word, 1.8, 7) for word in words)]
            axis.set_title('\n'.join(words), fontsize=7, parse_math=False)
            overlaid.draw_boxes(axis, pictures[k], [names[c] for c in pictures[k].classes])
    if names:
        known = {name for example in examples for name in example['labels']}
        shown = {k: name for k, name in enumerate(names) if name in known}
        overlaid.draw_legend(figure, shown, loc='outside lower center', ncols=6)
    figure.suptitle(title, fontsize=9, parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=120)
    storage.write(path, file.getvalue())


def main(argv: list[str], changes: Sequence) -> None:
    options = flags.FLAGS
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}')
    to = options.show and picture(options.show, options.force)
    config = configs.load(options.config, changes)
    source = mixture.load(**config.data.source)
    steps = assembly.steps_of(config, source)
    if options.step >= steps:
        raise UserError(f'--step is {options.step}; there are 0 to {steps - 1:,}')
    task, names = assembly.task_of(config, source), ()
    if {'label_map', 'boxes', 'segments'} & task.blank.keys():
        names = task.names['classes']
        pictures, examples = annotated(config, source, task, options.step, options.count)
    elif task.tokenizer is not None:
        pictures, examples = captioned(config, source, task, options.step, options.count)
        if to and not pictures:
            raise UserError(f'--show={options.show}: task {config.data.task} has no images')
    else:
        batch, images, weights = model_inputs(config, source, options.step)
        examples = list(rows(batch, weights, source, options.count))
        pictures = [overlays.Picture(np.clip(image / 255, 0, 1)) for image in images]
    for row in examples:
        if options.json:
            print(to_json(row))
        else:
            labels = ', '.join(
                printable(k) if task.tokenizer else f'{printable(k)} {v:g}'
                for k, v in row['labels'].items()
            )
            used = '' if row['used'] else '  NOT USED'
            print(f'{row["id"]:>10}  {printable(row["name"])}  {labels}{used}')
    if options.show:
        title = f'{mixture.title(config.data.source)}, step {options.step}'
        draw(*to, pictures, examples, title, names)


if __name__ == '__main__':
    flags.DEFINE_string('config', None, 'Experiment file or config.json.', required=True)
    flags.DEFINE_integer('step', 0, 'Which batch; 0 is the first.', lower_bound=0)
    flags.DEFINE_string('show', None, 'Where to draw it: a .png, .pdf or .svg.')
    flags.DEFINE_bool('force', False, 'Replace a file of --show that is there.')
    flags.DEFINE_integer('count', 64, 'Examples to show, from the first on.', lower_bound=1)
    flags.DEFINE_bool('json', False, 'Print JSON lines in place of text.')
    cli.run(main, 'config')
