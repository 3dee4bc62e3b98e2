"""python -m vit_jax.data: the picture of a batch is of the very batch that the step trains on."""

import json
import pathlib
import subprocess
import sys

import launched
import numpy as np
import pytest
from PIL import Image

from vit_jax import config
from vit_jax.data import mixture, order

# Compares the loss of a training step with the loss of the images and labels that are shown.
SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from vit_jax import assembly, sharding, step
from vit_jax.objectives import losses
from vit_jax import config as configs
from vit_jax.data import __main__ as show, pipeline

config = configs.load(sys.argv[1], [o.split('=', 1) for o in sys.argv[2:]])
parts = assembly.make(config)
state = step.init(parts.objective, parts.tx, config.seed, parts.abstract)
state = state.replace(step=state.step + 5)
rng = np.random.default_rng(0)  # the head is zeros: then the loss would say nothing of the images
params = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype), state.params)
state = state.replace(params=params)
batch, images, weights = show.model_inputs(config, parts.source, 5)
seen = (images / 255 - np.array(parts.model.mean)) / np.array(parts.model.std)
logits, _ = parts.model.apply({'params': params}, jnp.float32(seen))
shown = float(jnp.mean(losses.softmax_xent(logits, jnp.asarray(weights))))
plain, _ = parts.model.apply({'params': params}, parts.model.normalise(batch['image']))
unmixed = float(jnp.mean(losses.softmax_xent(plain, jnp.asarray(batch['label']))))
advance = step.compiled(parts.objective, parts.tx, parts.abstract, parts.mesh, seed=config.seed,
                        accumulate=config.accumulate)
_, metrics = advance(state, sharding.put(batch, parts.mesh), {})
print(float(metrics['loss']), shown, unmixed)
"""
MIXED = ('objective.mixup=0.8', 'objective.cutmix=1.0', 'objective.mix_by=example',
         'model.dropout=0.0', 'model.drop_path=0.0', "data.augment=('autoaugment',)")  # fmt: skip


@pytest.mark.slow
def test_it_shows_what_the_step_trains_on(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 1})
    experiment = f'{launched.TINY}:{folder}'
    for options in (MIXED, (*MIXED, 'accumulate=2')):
        done = subprocess.run(
            [sys.executable, '-c', SCRIPT, experiment, *options], text=True, capture_output=True,
            env=launched.ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        trained, shown, unmixed = map(float, done.stdout.split())
        np.testing.assert_allclose(trained, shown, rtol=1e-4)
        assert abs(trained - unmixed) > 1e-3 * trained


@pytest.mark.slow
def test_the_command_names_each_example_and_draws_it(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 1})
    experiment, picture = f'{launched.TINY}:{folder}', tmp_path / 'batch.png'
    command = [sys.executable, '-m', 'vit_jax.data', f'--config={experiment}', '--step=3']
    done = subprocess.run(
        [*command, f'--show={picture}', '--json'], text=True, capture_output=True,
        env=launched.ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    full = config.load(experiment)
    source = mixture.load(**full.data.source)
    ids = order.batch_ids(source, batch_size=full.data.batch_size, seed=full.seed, step=3)
    assert [row['id'] for row in rows] == ids.tolist()
    for row in rows:
        assert row['name'] == source.name(row['id']) and row['used']
        assert row['labels'] == {pathlib.Path(row['name']).parent.name: 1.0}
    assert Image.open(picture).size[0] > 800
    kept = subprocess.run(
        [*command, f'--show={picture}'], text=True, capture_output=True, env=launched.ENVIRONMENT
    )
    assert kept.returncode == 2 and f'{picture} exists; --force' in kept.stderr
    wrong = subprocess.run(
        [*command, '--show=/nowhere/x.png'], text=True, capture_output=True,
        env=launched.ENVIRONMENT,
    )  # fmt: skip
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith('error: --show=')
