"""Exports to one self-contained file: python -m vit_jax.export --checkpoint X --out FILE.

X is anything that vit_jax.load takes. The file runs without this package, wherever jax and
flatbuffers are installed, on a CPU, an NVIDIA GPU or a TPU:

    predict = jax.export.deserialize(open(FILE, 'rb').read()).call
    probabilities = predict(images)

Images are uint8 [B, H, W, 3] of any number and size, as decoded. The file contains the
normalisation and the view: a central crop or, with --view=resize, the whole image squeezed, which
leaves images of the model's size as they are. Each new shape [B, H, W] is compiled on its first
call. The probabilities are float32 [B, K], of a softmax or, where the model was trained with one, a
sigmoid, as in vit_jax.predict; a checkpoint without a head gives the features before the head,
[B, D]. A run whose objective has a network of its own gives {name: array}, what the objective's
`predict` returns. Names of the classes, and the origin of the file:

    json.loads(zipfile.ZipFile(FILE).read('metadata.json'))['classes']

JAX guarantees to read such a file for six months of its releases, and from 0.11.1 on refuses older
files. Keep the checkpoint.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath
from ml_collections import ConfigDict

import vit_jax
from vit_jax import cli, export, models
from vit_jax.assembly import restore
from vit_jax.convert import load as weights
from vit_jax.convert import stages
from vit_jax.data import files
from vit_jax.errors import UserError
from vit_jax.evaluators import classify
from vit_jax.io import storage
from vit_jax.io.text import brief, printable
from vit_jax.run import heading, workdir


def target(name: str) -> pathlib.Path | epath.Path:
    """The path of the file to write; makes its folder. Raises UserError if it can't be written."""
    if storage.is_remote(name):
        return workdir.located(name)
    return storage.prepare_file(pathlib.Path(os.path.abspath(os.path.expanduser(name))))


def classifier(
    checkpoint: str,
    ema: bool | None,
    *,
    size: int | None,
    dtype: str | None,
    view: str | None,
    platforms: Sequence[str],
) -> tuple[jax.export.Exported, dict[str, Any]]:
    """Exports a checkpoint as a classifier: (the function, what JAX does not store of it)."""
    fields = {} if dtype is None else dict(dtype=dtype, matmul_dtype=None)
    found = weights.read(checkpoint, image_size=size, ema=ema, as_input=True, **fields)
    image_size = found.image_size or (size or files.DEFAULT_SIZE,) * 2
    view = view or found.view
    exported = export.exported(
        found.model, found.params, image_size, view=view, loss=found.loss, platforms=platforms
    )
    outputs = range(found.model.num_classes or 0)  # some outputs of a run have no name
    return exported, dict(
        classes=found.classes and [classify.class_name(found.classes, i) for i in outputs],
        output='pre_logits' if found.model.num_classes is None else 'probabilities',
        loss=found.loss,  # training loss of the head: softmax or sigmoid
        image_size=list(image_size), view=view, dtype=found.model.dtype,
        model=models.describe(found.model)['name'],
    )  # fmt: skip


def method(
    checkpoint: str,
    config: ConfigDict,
    ema: bool | None,
    *,
    size: int | None,
    dtype: str | None,
    view: str | None,
    platforms: Sequence[str],
) -> tuple[jax.export.Exported, dict[str, Any]]:
    """Exports what the objective of a run with this config predicts; returns as `classifier`."""
    objective = config.objective.name
    for flag, value in (('dtype', dtype), ('image_size', size)):
        if value is not None:
            raise UserError(
                f'--{flag} is {value}, but objective {objective} has a network of its own, which '
                'does not take it'
            )
    parts, params = restore.parts_and_params(checkpoint, config, ema, jax.devices()[:1])
    params = jax.tree.map(jnp.asarray, jax.device_get(params))  # without a mesh
    predict = restore.predict_images(config, parts)
    *image_size, channels = parts.inputs['image'].shape
    view = view or stages.view_of(config.to_dict()) or 'central'
    try:
        exported = export.exported_function(
            predict, params, tuple(image_size), channels, view=view, platforms=platforms
        )
    except (TypeError, ValueError, NotImplementedError) as e:  # of JAX, at symbolic shapes
        raise UserError(
            f'objective {objective} cannot be exported, as its `predict` needs a known number of '
            f'images ({brief(e)}); vit_jax.predict --out=FILE.npz runs it'
        ) from e
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return exported, dict(
        classes=None, output=list(outputs), loss=None, image_size=image_size, view=view, dtype=None,
        model=heading.model_name(config),
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f'unexpected argument {argv[1]!r}')
    path = target(options.out)
    with storage.explained(path, 'read'):
        storage.check_free(path, options.force)
    platforms = export.check_platforms(options.platforms)
    config = restore.config_of_method(options.checkpoint, with_model=False)
    ema = None if options.ema else False
    settings = dict(
        size=options.image_size, dtype=options.dtype, view=options.view, platforms=platforms
    )
    exported, about = (
        method(options.checkpoint, config, ema, **settings) if config
        else classifier(options.checkpoint, ema, **settings)
    )  # fmt: skip
    about |= dict(
        platforms=platforms, checkpoint=options.checkpoint,
        versions=dict(vit_jax=vit_jax.__version__, jax=jax.__version__),
    )  # fmt: skip
    data = export.serialised(exported, about)
    storage.write(path, data, sync=True)
    (images,), outputs = exported.in_avals, exported.out_avals
    names = [about['output']] if isinstance(about['output'], str) else about['output']
    text = ', '.join(
        f'{name} {output.dtype}{list(output.shape)}'
        for name, output in zip(names, outputs, strict=True)
    )
    print(
        f'Written: {printable(path)} ({len(data) / 1e6:.1f} MB, for {", ".join(platforms)}): '
        f'{images.dtype}{list(images.shape)} -> {text}'
        + ('; the checkpoint has no head' if about['output'] == 'pre_logits' else '')
    )


if __name__ == '__main__':
    flags.DEFINE_string(
        'checkpoint', None, 'Checkpoint to export: a path, an address or a catalogue name.',
        required=True,
    )  # fmt: skip
    flags.DEFINE_string('out', None, 'File to write, local or on gs://.', required=True)
    flags.DEFINE_list('platforms', list(export.PLATFORMS), 'Platforms that the file runs on.')
    flags.DEFINE_integer(
        'image_size', None, "Image size in pixels. Default: the checkpoint's.", lower_bound=1,
        upper_bound=65_536,
    )  # fmt: skip
    flags.DEFINE_enum(
        'dtype', None, ['float32', 'bfloat16'], "Type of activations. Default: the checkpoint's. "
        'Weights and results are float32.',
    )  # fmt: skip
    flags.DEFINE_enum(
        'view', None, ['central', 'resize'], 'How to make an image square: crop or squeeze. '
        "Default: that of a run's first evaluation or of the checkpoint's documents, else central.",
    )  # fmt: skip
    flags.DEFINE_bool('force', False, 'Replace the file if it exists.')
    flags.DEFINE_bool(
        'ema', True, "Export the moving average of a run's parameters if it was saved."
    )
    cli.run(main)
