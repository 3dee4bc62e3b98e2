"""Predictions of small detectors and segmenters, for tests: runs, images and the command."""

import json
import types

import jax
import launched
import numpy as np
from PIL import Image

from vit_jax import assembly, config
from vit_jax.predict import __main__ as command

SHAPES = (40, 60), (90, 30), (16, 16)


def photos(folder):
    """Files of noise of SHAPES."""
    rng = np.random.default_rng(4)
    paths = [folder / f'{i}.png' for i in range(len(SHAPES))]
    for path, shape in zip(paths, SHAPES, strict=True):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(path)
    return paths


def predicted(capsys, checkpoint, paths, **given):
    """What `python -m vit_jax.predict` prints."""
    options = dict(
        checkpoint=str(checkpoint), ema=True, image_size=None, patch_size=None, view=None,
        threshold=None, masks=None, stuff=None, stride=None, scales=None, flip=False, json=True,
        out=None, batch_size=2, force=False,
    )  # fmt: skip
    command.find([str(path) for path in paths], types.SimpleNamespace(**options | given))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def a_run(path, module, objective, folder):
    """The workdir of a run with random parameters of a config such as tests/tiny_segment.py."""
    rng = np.random.default_rng(4)
    given = config.experiment.read(f'{module.__file__}:{folder}')
    given['objective'] = objective
    given['data']['image_size'] = 16
    full = config.complete(given)
    parts = assembly.make(full, devices=jax.devices()[:1])
    params = jax.tree.map(
        lambda x: x + 0.5 * rng.normal(size=x.shape).astype(np.float32),
        parts.objective.init(jax.random.key(0)),
    )
    return launched.write_run(path, full, parts, params)
