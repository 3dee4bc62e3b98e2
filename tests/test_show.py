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
from vit_jax.data import mixture, order, overlays

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


def test_masks_are_painted_where_they_are_and_named():
    image, labels = np.full((12, 10, 3), 100, np.uint8), np.zeros((12, 10), np.uint8)
    labels[2:9, 3:9], labels[11] = 2, 255
    names, example = ('background', 'a', 'b'), dict(image=image, label_map=labels)
    made = overlays.picture(example, names).image
    inner = np.zeros((12, 10), bool)
    inner[3:8, 4:8] = True
    colour = 255 * np.array(overlays.colour(2))
    mixed = (1 - overlays.STRENGTH) * 100 + overlays.STRENGTH * colour
    np.testing.assert_allclose(made[inner], np.broadcast_to(mixed, (20, 3)), atol=1)
    np.testing.assert_allclose(made[2, 3:9], np.broadcast_to(colour, (6, 3)), atol=1)
    assert (made[labels == 0] == 100).all() and (made[11] < 50).all()
    assert overlays.contents(example, names) == {'background': round(68 / 110, 4), 'b': 0.3818}
    example = dict(
        image=image, labels=np.int32([1, 1, -1]), masks=np.stack([labels == 2] * 3),
        boxes=np.float32([[0.3, 0.25, 0.9, 0.75], [0, 0, 1, 1], [0, 0, 0, 0]]),
    )  # fmt: skip
    drawn = overlays.picture(example, names)
    np.testing.assert_allclose(drawn.boxes, [[3, 3, 9, 9], [0, 0, 10, 12]], atol=1e-5)
    assert drawn.classes == [1, 1] and overlays.contents(example, names) == {'a': 2}
    assert (drawn.image[labels == 0] == 100).all() and (drawn.image[inner] != 100).any(-1).all()


@pytest.mark.slow
def test_the_command_draws_label_maps_and_names_what_is_in_them(tmp_path):
    import scenes

    rng = np.random.default_rng(0)
    for i in range(4):
        labels, image = scenes.blocks((40, 50), rng)
        for name, content in (('images', image), ('masks', labels)):
            path = tmp_path / 'set' / name / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(scenes.png(content))
    (tmp_path / 'set' / 'classes.txt').write_text('a\nb\nc\nd\ne')
    (tmp_path / 'x.py').write_text(f"""
from ml_collections import ConfigDict
def get_config():
  return ConfigDict(dict(steps=5, model=dict(name='vit-ti/16'), data=dict(
    task='segment', source=dict(name={str(tmp_path / 'set')!r}), view='fit', image_size=32,
    batch_size=4)))
""")
    command = [sys.executable, '-m', 'vit_jax.data', f'--config={tmp_path}/x.py', '--json']
    done = subprocess.run(
        [*command, f'--show={tmp_path}/x.png'], text=True, capture_output=True,
        env=launched.ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert set(row['labels']) <= set('abcde') and abs(sum(row['labels'].values()) - 1) < 1e-3
    assert Image.open(tmp_path / 'x.png').size[0] > 800
