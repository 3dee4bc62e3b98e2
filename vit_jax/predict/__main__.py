"""Predicts from images: python -m vit_jax.predict --checkpoint X IMAGE...

X is anything that vit_jax.load takes. Images are files, folders of them, or their addresses. Prints
the most likely classes of each image and their probabilities (of a softmax, or of a sigmoid where
the model was trained with one), by name where names are known. --json prints one JSON object per
image, with names exactly as they are. An image that can't be read is reported on stderr and
skipped; the exit status is then 2.

--features FILE.npz writes, instead of classes, the input of the head for each image, even if the
checkpoint has no head: `features` float32 [images, D] and `files`, their names.

--out FILE.npz writes, instead of classes, all named arrays that the checkpoint predicts: of a run,
what its objective's `predict` returns (docs/extending.md); of any other checkpoint, the model's
intermediates (pre_logits, logits, tokens, ...). `files` are the names of the images.

Of a detector or segmenter (a run of objective detect, segment or masks, or a public YOLOS or EoMT)
it prints what is where, at the size of the image: of detectors the objects whose score is above
--threshold, with their boxes (x, y, width and height in pixels); of segmenters each class and its
share of the pixels. --masks=instances makes objects with masks of what a mask classifier predicts,
--masks=panoptic segments of things and stuff. --stride cuts an image into windows, of whose logits
a pixel has the mean; with --scales at several sizes and with --flip mirrored, too, as evaluations
do. --json adds masks as run lengths of COCO (`segmentation`). --out FILE.png, or --out FOLDER for
several images, draws all this over the images. --out FILE.npz has the arrays, as above.

--labels "a shoe,a bag", for a checkpoint with an image and a text tower (SigLIP, CLIP, a run of
objective contrastive), makes classes of texts: the probability that each describes the image.
--labels=FILE has one in each line. --templates are texts with a place {} for them, such as "a photo
of a {}.", or openai_80, those of CLIP; the mean of their embeddings counts. --out FILE.png draws
images beside texts with the cosines of their embeddings, and with --maps where in an image.

--hide 0.75, for a masked autoencoder with its decoder, hides a share of the patches (--seed says
which) and draws a row for each image: the image, what the model sees of it, and what it restores.
--out FILE.png names the picture, restored.png by default. A model of normalised patches does not
predict their mean and deviation, which are guessed from the visible patches.
"""

import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
from absl import flags

from vit_jax import cli
from vit_jax.data import files, prompts, tasks
from vit_jax.errors import UserError
from vit_jax.evaluators import classify
from vit_jax.figures import labelled, restored
from vit_jax.io.text import printable, to_json
from vit_jax.predict import (
    Predictor,
    by_labels,
    classifier,
    dense,
    findings,
    method,
    output,
    predicted,
    read_ahead,
    windowed,
    write_arrays,
)


def main(argv: Sequence[str]) -> None:
    options = flags.FLAGS
    if not argv[1:]:
        raise UserError('no image is named; give paths of images or folders')
    if options.features and options.out:
        raise UserError('--features and --out are both given; --out writes pre_logits, too')
    if options.hide is not None:
        if options.features or options.json:
            raise UserError('--hide draws a picture; leave out --features and --json')
        out = options.out or 'restored.png'
        output.check_output('out', out, options.force, '.png')
        written = restored.write(
            pathlib.Path(out).absolute(), options.checkpoint, files.find_images(argv[1:]),
            hide=options.hide, seed=options.seed, image_size=options.image_size, view=options.view,
            ema=None if options.ema else False,
        )  # fmt: skip
        print(f'Written: {printable(out)}: {written}')
        return
    drawn = options.labels is not None and (options.out or '').endswith('.png')
    check_labels(options, drawn)
    if drawn:
        draw_labels(argv[1:], options)
        return
    to_arrays = options.features or (options.out or '').endswith('.npz')
    if not to_arrays and options.labels is None and dense.is_dense(options.checkpoint):
        find(files.find_images(argv[1:]), options)
        return
    for name in ('masks', 'stride', 'scales', 'flip', 'stuff'):
        if getattr(options, name):
            kind = 'mask classifiers' if name in ('masks', 'stuff') else 'segmenters'
            raise UserError(f'--{name} is for {kind}, and {options.checkpoint} is none')
    classify_images(argv[1:], options)


def check_labels(options: flags.FlagValues, drawn: bool) -> None:
    """Raises UserError for flags of --labels that nothing would read."""
    if options.labels is not None and not drawn and (options.out or options.features):
        raise UserError('--labels prints classes, or draws them with --out=FILE.png')
    if options.maps and not drawn:
        raise UserError('--maps draws where texts are; give --labels and --out=FILE.png')
    if options.labels is None and (options.templates != [prompts.PLACE] or options.tokenizer):
        name = 'tokenizer' if options.tokenizer else 'templates'
        raise UserError(f'--{name} is for the texts of --labels; give --labels')


def classify_images(names: Sequence[str], options: flags.FlagValues) -> None:
    """Prints classes of images, or writes features or other arrays to a file."""
    out = options.features or options.out
    if out:
        output.check_output('features' if options.features else 'out', out, options.force)
    paths = files.find_images(names)
    kind = 'features' if options.features else 'all' if options.out else 'classes'
    arguments = (options.checkpoint, kind, None if options.ema else False, options.image_size)
    if options.labels is not None:
        predictor = of_labels(options)
    else:
        predictor = method(*arguments) or classifier(*arguments, options.patch_size)
    view = tasks.fixed_view(
        predictor.view if options.view is None else options.view, predictor.image_size
    )
    batch_size = min(options.batch_size, len(paths))
    rows, images = [], read_ahead(paths, view, 2 * batch_size)
    with output.counted(len(paths)) as usable:
        for path, outputs in usable(predicted(predictor, images, batch_size)):
            if out:
                rows.append((path, outputs))
            else:
                show(path, outputs, predictor.classes, options.top)
        if rows:
            write_arrays(out, rows)


def of_labels(options: flags.FlagValues, drawn: by_labels.Drawn | None = None) -> Predictor:
    """The classifier that --labels makes of two towers."""
    labels, templates = options.labels, options.templates
    if len(labels) == 1 and by_labels.is_address(labels[0]):
        labels = labels[0]
    if len(templates) == 1 and prompts.PLACE not in templates[0]:
        templates = templates[0]
    texts = prompts.chosen('--labels', labels, prompts.LABELS)
    if labels not in list(prompts.LABELS):
        by_labels.check_distinct(texts)
    return by_labels.predictor(
        options.checkpoint, texts, prompts.templates_of(templates), tokenizer=options.tokenizer,
        ema=None if options.ema else False, image_size=options.image_size,
        patch_size=options.patch_size, drawn=drawn,
    )  # fmt: skip


def draw_labels(names: Sequence[str], options: flags.FlagValues) -> None:
    """Draws images beside the texts of --labels."""
    output.check_output('out', options.out, options.force, '.png')
    if options.json:
        raise UserError('--json prints classes; leave out --out, which draws them')
    paths = files.find_images(names)
    predictor = of_labels(options, 'maps' if options.maps else 'cosines')
    for kind, found in (('images', paths), ('labels', predictor.classes)):
        if len(found) > labelled.MOST:
            print(f'{kind}: the first {labelled.MOST} of {len(found):,} are drawn', file=sys.stderr)
    paths = paths[: labelled.MOST]
    view = tasks.fixed_view(
        predictor.view if options.view is None else options.view, predictor.image_size
    )
    pixels, found = dict(read_ahead(paths, view, len(paths))), {}
    images = ((path, pixels[path]) for path in paths)
    with output.counted(len(paths)) as usable:
        size = min(options.batch_size, len(paths))
        found |= dict(usable(predicted(predictor, images, size)))
        if found:
            rows = list(found.values())
            arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            labelled.draw(
                pathlib.Path(options.out).absolute(), [pixels[path] for path in found],
                predictor.classes, arrays['cosines'], arrays.get('maps'),
            )  # fmt: skip
            print(f'Written: {printable(options.out)}')


def find(paths: Sequence[str], options: flags.FlagValues) -> None:
    """Prints or draws what a detector or segmenter finds in images."""
    pictures = output.pictures_of(paths, options.out, options.force) if options.out else {}
    finder = dense.finder(
        options.checkpoint, threshold=options.threshold, masks=options.masks, stuff=options.stuff,
        ema=None if options.ema else False, image_size=options.image_size,
        patch_size=options.patch_size,
    )  # fmt: skip
    with output.counted(len(paths)) as usable:
        for (path, place), outputs in usable(outputs_of(paths, finder, options)):
            one, names = finder.find(outputs, place), finder.predictor.classes
            if options.json:
                print(to_json(findings.record(path, one, names)), flush=True)
            else:
                output.print_rows(path, findings.lines(one, names))
            if path in pictures:
                findings.draw(pictures[path], findings.original(path), one, names)
                if not options.json:
                    print(f'Written: {printable(pictures[path])}')


def outputs_of(
    paths: Sequence[str], finder: dense.Finder, options: flags.FlagValues
) -> Iterator[tuple[Any, Any]]:
    """Yields ((path, place), outputs), or a UserError in place of them, of all images."""
    predictor, batch_size = finder.predictor, min(options.batch_size, len(paths))
    view = tasks.whole_view(options.view or predictor.view, predictor.image_size)
    windows = windowed.windows_of(predictor.image_size, options.stride, options.scales)
    if windows is None and not options.flip:
        images = read_ahead(paths, dense.with_places(view), 2 * batch_size)
        return predicted(predictor, dense.keyed(images), batch_size)
    if not finder.by_pixel:
        raise UserError('--stride and --flip are for label maps, and this finds objects')
    images = read_ahead(paths, windowed.cutter(view, windows), 2)
    return windowed.predicted(predictor, dense.keyed(images), windows, options.flip)


def show(
    path: str, probabilities: np.ndarray, classes: Sequence[str] | None, top: int
) -> None:
    """Prints the `top` classes of an image by their probabilities [K]."""
    best = np.argsort(-probabilities, kind='stable')[:top]
    rows = [(int(i), classify.class_name(classes, i), float(probabilities[i])) for i in best]
    if flags.FLAGS.json:
        found = [dict(index=i, name=n, probability=p) for i, n, p in rows]
        print(to_json({'image': str(path), 'top': found}), flush=True)
        return
    output.print_rows(path, [(f'{probability:7.2%}', name) for _, name, probability in rows])


if __name__ == '__main__':
    flags.DEFINE_string(
        'checkpoint', None, 'Checkpoint to predict with: a path, an address or a catalogue name.',
        required=True,
    )  # fmt: skip
    flags.DEFINE_integer('top', 5, 'Number of classes to print for each image.', lower_bound=1)
    flags.DEFINE_integer('batch_size', 32, 'Number of images in a batch.', lower_bound=1)
    flags.DEFINE_integer(
        'image_size', None, "Image size in pixels. Default: the checkpoint's.", lower_bound=1,
        upper_bound=65_536,
    )  # fmt: skip
    flags.DEFINE_integer(
        'patch_size', None, "Resize the kernel of a ViT's patches to this side, in pixels.",
        lower_bound=1, upper_bound=65_536,
    )  # fmt: skip
    flags.DEFINE_string(
        'view', None, 'How to make an image square: central (crop), resize (squeeze) or fit (pad). '
        "Default: that of a run's first evaluation or of the checkpoint's documents, else central, "
        'or fit for detectors and segmenters.',
    )  # fmt: skip
    flags.DEFINE_bool(
        'ema', True, "Predict with the moving average of a run's parameters if it was saved."
    )
    flags.DEFINE_string('features', None, 'Write the input of the head to this .npz file.')
    flags.DEFINE_string(
        'out', None, 'Write all arrays that are predicted to this .npz file, or the picture of '
        '--hide or of a detector or segmenter to this .png file, or several into this folder.',
    )  # fmt: skip
    flags.DEFINE_float(
        'threshold', None, 'Score above which an object or segment is found. Default: 0.5, or 0.8 '
        'of panoptic segments.', lower_bound=0, upper_bound=1,
    )  # fmt: skip
    flags.DEFINE_enum(
        'masks', None, list(get_args(dense.Masks)), 'Whether the masks of a mask classifier are a '
        'class for each pixel, objects or panoptic segments. Default: as a run was trained, else '
        'semantic.',
    )  # fmt: skip
    flags.DEFINE_list(
        'stuff', None, 'Names of classes that are no things, each one panoptic segment. Default: '
        "those of a run's data set, else none.",
    )  # fmt: skip
    flags.DEFINE_integer(
        'stride', None, 'Pixels from one window to the next, which slide over an image for its '
        'label map. Default: one view shows the image.', lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_list('scales', None, 'Scales of the image at which windows slide. Default: 1.')
    flags.DEFINE_bool('flip', False, 'Predict label maps of mirrored images, too.')
    flags.DEFINE_float(
        'hide', None, 'Hide this share of the patches and draw what a masked autoencoder restores.',
        lower_bound=0, upper_bound=1,
    )  # fmt: skip
    flags.DEFINE_list(
        'labels', None, 'Texts that images are classified into, separated by commas, a file with '
        'one in a line, or imagenet.',
    )  # fmt: skip
    flags.DEFINE_list(
        'templates', '{}', 'Texts with a place {} for a label of --labels, a file of them, '
        'openai_80 or openai_7.',
    )  # fmt: skip
    flags.DEFINE_bool('maps', False, 'Draw where in an image the texts of --labels are.')
    flags.DEFINE_string(
        'tokenizer', None, "Tokenizer of --labels. Default: the checkpoint's."
    )
    flags.DEFINE_integer('seed', 0, 'Decides which patches --hide hides.', lower_bound=0)
    flags.DEFINE_bool('force', False, 'Replace files of --features or --out that exist.')
    flags.DEFINE_bool('json', False, 'Print one JSON object per image.')
    cli.run(main)
