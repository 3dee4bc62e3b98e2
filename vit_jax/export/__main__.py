"""Exports to one self-contained file: python -m vit_jax.export --checkpoint X --output FILE.

X is anything that vit_jax.load takes. The file runs without this package, wherever jax and
flatbuffers are installed, on a CPU, an NVIDIA GPU or a TPU:

    predict = jax.export.deserialize(open(FILE, 'rb').read()).call
    probabilities = predict(images)

Images are uint8 [B, H, W, 3] of any number and size, as decoded. The file contains the
normalisation and the view: a central crop or, with --view=resize, the whole image squeezed, which
leaves images of the model's size as they are. Each new shape [B, H, W] is compiled on its first
call. The probabilities are float32 [B, K], of a softmax or, where the model was trained with one, a
sigmoid, as in vit_jax.predict; a checkpoint without a head gives the features before the head,
[B, D]. Names of the classes, and the origin of the file:

    json.loads(zipfile.ZipFile(FILE).read('metadata.json'))['classes']

JAX guarantees to read such a file for six months of its releases (from 0.11.1 on it refuses older
ones), so keep the checkpoint.
"""

import os
import pathlib

import jax
from absl import flags

import vit_jax
from vit_jax import cli, export, models
from vit_jax.convert import load as weights
from vit_jax.convert.save import complete
from vit_jax.errors import UserError
from vit_jax.evaluators import classify
from vit_jax.io import storage
from vit_jax.io.text import printable
from vit_jax.run import workdir

DEFAULT_SIZE = 224  # for a model that takes any size

CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'What to export: a path, an address, a name of the catalogue.',
    required=True,
)  # fmt: skip
OUTPUT = flags.DEFINE_string('output', None, 'The file to write, here or on gs://.', required=True)
PLATFORMS = flags.DEFINE_list(
    'platforms', list(export.PLATFORMS), 'Where the file is to run, one or several.'
)
SIZE = flags.DEFINE_integer(
    'image_size', None, "Pixels a side, if not the checkpoint's own.", lower_bound=1,
    upper_bound=65_536,
)  # fmt: skip
DTYPE = flags.DEFINE_enum(
    'dtype', None, ['float32', 'bfloat16'], "Of the computation, if not the checkpoint's own; "
    'weights and results are float32.',
)  # fmt: skip
VIEW = flags.DEFINE_enum(
    'view', None, ['central', 'resize'], 'How an image becomes a square: central (crop, the '
    'default) or resize (squeeze). Of a run: as its first evaluation does.',
)  # fmt: skip
FORCE = flags.DEFINE_bool('force', False, 'Replace a file that is there.')
EMA = flags.DEFINE_bool('ema', True, 'Of a run: the moving average of the parameters, if kept.')


def target(name):
    """The path of the file to write; makes its folder. Raises UserError if it can't be written."""
    if storage.remote(name):
        return workdir.located(name)
    return storage.file(pathlib.Path(os.path.abspath(os.path.expanduser(name))))


def write(path, data):
    """Writes the bytes in one step: the file is complete, or as it was."""
    if storage.remote(path):
        storage.write(path, data)
        return
    with complete(path) as part:
        part.write_bytes(data)


def metadata(found, size, view, platforms):
    """What JAX does not store in the file, as a JSON object."""
    outputs = range(found.model.num_classes or 0)  # some outputs of a run have no name
    return dict(
        classes=found.classes and [classify.class_name(found.classes, i) for i in outputs],
        output='pre_logits' if found.model.num_classes is None else 'probabilities',
        loss=found.loss,  # training loss of the head: softmax or sigmoid
        image_size=list(size), view=view, platforms=platforms, dtype=found.model.dtype,
        model=models.describe(found.model)['name'], checkpoint=CHECKPOINT.value,
        versions=dict(vit_jax=vit_jax.__version__, jax=jax.__version__),
    )  # fmt: skip


def main(argv):
    if argv[1:]:
        raise UserError(f'unexpected argument {argv[1]!r}')
    path = target(OUTPUT.value)
    with storage.explained(path, 'read'):
        storage.check_free(path, FORCE.value)
    platforms = export.check_platforms(PLATFORMS.value)
    fields = {} if DTYPE.value is None else dict(dtype=DTYPE.value)
    found = weights.read(
        CHECKPOINT.value, image_size=SIZE.value, ema=None if EMA.value else False, as_input=True,
        **fields,
    )  # fmt: skip
    size = found.image_size or (SIZE.value or DEFAULT_SIZE,) * 2
    view = VIEW.value or found.view
    exported = export.exported(
        found.model, found.params, size, view=view, loss=found.loss, platforms=platforms
    )
    about = metadata(found, size, view, platforms)
    data = export.serialised(exported, about)
    write(path, data)
    (images,), (output,) = exported.in_avals, exported.out_avals
    print(
        f'Written: {printable(path)} ({len(data) / 1e6:.1f} MB, for {", ".join(platforms)}): '
        f'{images.dtype}{list(images.shape)} -> {about["output"]} {output.dtype}'
        f'{list(output.shape)}'
        + ('; the checkpoint has no head' if found.model.num_classes is None else '')
    )


if __name__ == '__main__':
    cli.run(main)
