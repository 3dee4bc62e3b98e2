"""An exported file gives, without this package, what `predict` gives, and is whole or as it was."""

import functools
import itertools
import json
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
import storage as stores
from PIL import Image
from sklearn.datasets import load_sample_images

import vit_jax
from vit_jax import export, models
from vit_jax.convert import load
from vit_jax.data import central, tasks
from vit_jax.distributed import topologies
from vit_jax.errors import UserError
from vit_jax.models import memory

SIZE, CLASSES = 48, ('ant', 'bee', 'cat', 'dog', 'eel', 'fox', 'gnu')
# In a process that has jax, what jax needs, and nothing else of what is installed.
ALONE = """
import importlib, json, sys
KNOWN = {'jax', 'jaxlib', 'jax_plugins', 'flatbuffers', 'numpy', 'ml_dtypes', 'opt_einsum', 'scipy'}

class Only:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        known = path is not None or name in KNOWN | sys.stdlib_module_names or name[0] == '_'
        return self.finder.find_spec(name, path, target) if known else None

sys.meta_path[:] = map(Only, sys.meta_path)
for name in ('vit_jax', 'flax', 'PIL'):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    sys.exit(f'{name} is there')
import jax, numpy as np
file, images, results = sys.argv[1:]
exported = jax.export.deserialize(open(file, 'rb').read())
outputs = {key: np.asarray(exported.call(x)) for key, x in np.load(images).items()}
np.savez(results, **outputs)
print(json.dumps(dict(platforms=exported.platforms, devices=exported.nr_devices)))
"""


def command(module, *arguments, **environment):
    """Exit status, stdout and stderr of a command, on one device."""
    done = subprocess.run(
        [sys.executable, '-m', f'vit_jax.{module}', *map(str, arguments)],
        capture_output=True, text=True, env=launched.ENVIRONMENT | environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def exported(checkpoint, file, *arguments):
    """Metadata of a file that was written."""
    status, out, error = command(
        'export', f'--checkpoint={checkpoint}', f'--out={file}', *arguments
    )
    assert status == 0 and out.startswith(f'Written: {file} ('), error
    return json.loads(zipfile.ZipFile(file).read('metadata.json'))


def alone(file, folder, **batches):
    """What the file makes of each batch [B, H, W, 3], where there is nothing but JAX."""
    np.savez(folder / 'images.npz', **batches)
    done = subprocess.run(
        [sys.executable, '-c', ALONE, file, folder / 'images.npz', folder / 'results.npz'],
        capture_output=True, text=True, env=launched.ENVIRONMENT, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / 'results.npz'))


def predicted(checkpoint, folder, images, *arguments):
    """[B, K] of images [B, H, W, 3] by vit_jax.predict, from files of them."""
    paths = [folder / f'{i}.png' for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    status, out, error = command(
        'predict', f'--checkpoint={checkpoint}', '--json', f'--top={len(CLASSES)}', *arguments,
        *paths,
    )  # fmt: skip
    assert status == 0, error
    rows = [json.loads(line)['top'] for line in out.splitlines()]
    return np.array([
        [row['probability'] for row in sorted(top, key=lambda row: row['index'])] for top in rows
    ])  # fmt: skip


def small(**fields):
    """A model with weights of noise that tells images apart."""
    model = models.build(
        'vit-ti/8', num_classes=len(CLASSES), width=32, depth=2, num_heads=2, mlp_dim=64,
        gelu='exact', **fields,
    )  # fmt: skip
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3)))['params']
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype), params)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoint') / 'hf'
    vit_jax.save(path, *small(), 'hf', image_size=SIZE, classes=CLASSES)
    return path


@pytest.fixture(scope='module')
def photographs():
    """uint8 [7, 300, 411, 3]: windows of two photographs."""
    pieces = [
        image[y : y + 300, x : x + 411]
        for image in load_sample_images().images  # 427 x 640
        for y in (0, 99)
        for x in (0, 229)
    ]
    return np.stack(pieces[:7])


def by_view(model, params, images, view='central', size=SIZE):
    """[B, K] of images [B, H, W, 3], by the parts of the package."""
    made = tasks.make_view(view, size)
    seen = np.stack([made(image, None) for image in images])
    logits, _ = jax.jit(model.apply)({'params': params}, model.normalise(seen))
    return np.asarray(jax.nn.softmax(logits.astype(np.float32)))


@pytest.mark.slow
def test_it_gives_what_predict_gives_where_there_is_only_jax(checkpoint, photographs, tmp_path):
    """To 1e-5 on images of the model's size: the pixels are the same."""
    file, view = tmp_path / 'model.jaxexport', tasks.make_view('resize', SIZE)
    about = exported(checkpoint, file, '--view=resize')
    assert about['classes'] == list(CLASSES) and about['output'] == 'probabilities'
    assert about['image_size'] == [SIZE, SIZE] and about['view'] == 'resize'
    assert about['platforms'] == ['cpu', 'cuda', 'tpu'] and about['dtype'] == 'float32'
    seen = np.stack([view(image, None) for image in photographs])
    found = alone(file, tmp_path, seven=seen, three=seen[:3], one=seen[:1])
    wanted = predicted(checkpoint, tmp_path, seen, '--view=resize')
    assert np.ptp(wanted, axis=0).max() > 0.01  # or else nothing is compared
    for name, count in dict(one=1, three=3, seven=7).items():
        assert found[name].dtype == np.float32 and found[name].shape == (count, len(CLASSES))
        np.testing.assert_allclose(found[name], wanted[:count], atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.slow
def test_images_of_any_size_are_seen_as_predict_sees_them(checkpoint, photographs, tmp_path):
    """To 1e-5 on most; a pixel that is rounded the other way moves a probability by some 1e-4."""
    file, model = tmp_path / 'model.jaxexport', vit_jax.load(checkpoint)
    about = exported(checkpoint, file, '--platforms=cpu,cpu')
    view = load.read(checkpoint).view
    assert about['view'] == view and view['name'] == 'small_central'  # as transformers has it
    assert about['platforms'] == ['cpu']
    batches = dict(
        wide=photographs, tall=photographs[:3, :, :150], tiny=photographs[:1, 100:131, 60:100]
    )
    found = alone(file, tmp_path, **batches)
    wanted = {name: by_view(*model, images, view) for name, images in batches.items()}
    np.testing.assert_allclose(
        wanted['wide'], predicted(checkpoint, tmp_path, photographs), atol=1e-5, rtol=0
    )
    errors = [np.abs(found[name] - wanted[name]).max(axis=1) for name in batches]
    assert np.median(np.concatenate(errors)) < 1e-5 and max(map(np.max, errors)) < 2e-3
    other = by_view(*model, photographs, 'resize')
    assert np.abs(other - wanted['wide']).max(axis=1).min() > 4e-3


@pytest.mark.parametrize('how', [
    dict(method='bilinear', antialias=True),
    pytest.param(dict(method='bilinear', antialias=False), marks=pytest.mark.slow),
    pytest.param(dict(method='bicubic', antialias=True), marks=pytest.mark.slow),
], ids=lambda how: '-'.join(map(str, how.values())))  # fmt: skip
def test_a_view_within_the_file_is_the_view_to_a_grey_level(how):
    china, flower = load_sample_images().images
    wrong = values = 0
    for size, view in itertools.product(((48, 48), (32, 80)), (
        dict(name='resize'), dict(name='resize', crop=0.875, rounding='torchvision'),
        dict(name='central'), dict(name='small_central', rounding='tensorflow'),
        dict(name='small_central', rounding='transformers'),
        dict(name='small_central', rounding='torchvision'),
    )):  # fmt: skip
        if view['name'] == 'small_central':
            view = view | dict(smaller=round(max(size) / 0.9))
        made = tasks.make_view(view | how, size)
        name, arguments = export.checked_view(view | how, size)
        squared = functools.partial(export.squared, size=size, name=name, **arguments)
        for image in (china[:301], china[:413, :59], flower[:31, :40]):
            image = np.ascontiguousarray(image)
            apart = np.abs(made(image, None) - np.int32(jax.jit(squared)(image[None])[0]))
            assert apart.max() <= 1, (size, view, image.shape)
            wrong, values = wrong + (apart > 0).sum(), values + apart.size
    assert wrong < 1e-3 * values  # what lies between two levels, but for rounding


def windows(size):
    """Sides of images to their window, as in a file; sides whose window rounding decides on."""

    def window(images):
        h, w = (jnp.asarray(n, jnp.int32) for n in images.shape)
        return jnp.stack(export.window(h, w, size, 0.875))

    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape('h, w'), jnp.uint8)
    call = jax.export.export(jax.jit(window), platforms=export.PLATFORMS)(images).call
    hard = [
        n for n in range(8, 4096) if round(size[0] * (0.875 * (n / size[0]))) != round(0.875 * n)
    ]
    return call, hard


@pytest.mark.parametrize('size', [(224, 224), (518, 518), (48, 80)])
def test_its_window_is_that_of_the_view_to_the_pixel(size):
    """Also where the view's rounding is not that of the true value."""
    call, hard = windows(size)
    assert len(hard) > 10
    for h in (*hard[:8], 1, 7, 332, 500):
        for w in (h, 2 * h + 1):
            wanted = central.window(h, w, size, 0.875)
            assert tuple(np.asarray(call(np.zeros((h, w), np.uint8)))) == wanted, (h, w)


@pytest.mark.slow
def test_without_a_head_it_gives_features(checkpoint, photographs, tmp_path):
    headless, file = tmp_path / 'headless', tmp_path / 'model.jaxexport'
    model, params = vit_jax.load(checkpoint, num_classes=0)
    vit_jax.save(headless, model, params, 'hf', image_size=SIZE)
    given = (f'--checkpoint={headless}', f'--out={file}', '--view=resize')
    status, said, error = command('export', *given)
    assert status == 0 and 'no head' in said and 'pre_logits float32[b, 32]' in said, error
    about = json.loads(zipfile.ZipFile(file).read('metadata.json'))
    assert about['output'] == 'pre_logits' and about['classes'] is None
    view = tasks.make_view('resize', SIZE)
    seen = np.stack([view(image, None) for image in photographs[:2]])
    _, out = model.apply({'params': params}, model.normalise(seen))
    found = alone(file, tmp_path, seen=seen)['seen']
    np.testing.assert_allclose(found, out['pre_logits'], atol=1e-5 * np.abs(found).max())


@pytest.mark.slow
def test_the_size_and_dtype_can_be_others(checkpoint, photographs, tmp_path):
    file = tmp_path / 'model.jaxexport'
    flags = ('--view=resize', '--image_size=32', '--dtype=bfloat16', '--platforms=cpu')
    about = exported(checkpoint, file, *flags)
    assert about['image_size'] == [32, 32] and about['dtype'] == 'bfloat16'
    view = tasks.make_view('resize', 32)
    seen = np.stack([view(image, None) for image in photographs[:3]])
    found = alone(file, tmp_path, seen=seen)['seen']
    rounded, exact = (
        by_view(*vit_jax.load(checkpoint, image_size=32, dtype=dtype), seen, 'resize', 32)
        for dtype in ('bfloat16', 'float32')
    )
    assert 1e-3 < np.abs(found - exact).max() < 0.1
    assert np.abs(found - rounded).max() < 0.05


@pytest.mark.slow
def test_a_mistake_is_one_line_and_leaves_the_file_as_it_was(checkpoint, tmp_path):
    file, folder, plain = tmp_path / 'model.jaxexport', tmp_path / 'folder', tmp_path / 'plain'
    file.write_bytes(b'before')
    folder.mkdir()
    plain.write_text('')
    given, out = f'--checkpoint={checkpoint}', f'--out={file}'
    for arguments, words in (
        ((given, out, '--platforms=cpu,gpu'), "no platform 'gpu'; there are cpu, cuda, tpu"),
        ((given, out, '--image_size=20'), 'is not divisible by the patch size'),
        ((given, f'--out={folder}'), f'cannot write {folder}: it is a folder'),
        ((given, f'--out={plain}/x'), f'cannot write {plain}/x'),
    ):
        status, said, error = command('export', *arguments, '--force')
        assert status == 2 and words in error and len(error.splitlines()) == 1, error
        assert not said and file.read_bytes() == b'before'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['folder', 'model.jaxexport', 'plain']


# Writes half of what it is to write, then the disk is full.
FULL = """
import errno, pathlib, runpy

def write_bytes(self, data, real=pathlib.Path.write_bytes):
    real(self, data[: len(data) // 2])
    raise OSError(errno.ENOSPC, 'No space left on device')

pathlib.Path.write_bytes = write_bytes
runpy.run_module('vit_jax.export', run_name='__main__')
"""


def test_a_full_disk_leaves_the_file_as_it_was(checkpoint, tmp_path):
    file = tmp_path / 'model.jaxexport'
    file.write_bytes(b'before')
    done = subprocess.run(
        [sys.executable, '-c', FULL, f'--checkpoint={checkpoint}', f'--out={file}', '--force'],
        capture_output=True, text=True, env=launched.ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f'cannot write {file}: No space left' in done.stderr
    assert file.read_bytes() == b'before' and list(tmp_path.iterdir()) == [file]


def test_what_can_not_be_exported_is_refused():
    model, params = small()
    for view in ('inception', dict(name='small_central'), dict(name='central', method='area')):
        with pytest.raises(UserError, match='cannot be exported; central, resize, small_cent'):
            export.exported(model, params, (SIZE, SIZE), view=view)
    huge = {'kernel': jax.ShapeDtypeStruct((2**29,), jnp.float32)}
    with pytest.raises(UserError, match='the weights are 2.1 GB'):
        export.exported(model, huge, (SIZE, SIZE))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['vit-ti/8', 'mixer-s/8', 'r+vit-ti/16'])
def test_every_kind_of_model_is_exported(name, photographs):
    """For three platforms at once; it gives what the model gives."""
    fields = dict(tokens_mlp_dim=16) if name.startswith('mixer') else dict(pool='map', glu=True)
    if not name.startswith('mixer'):
        fields |= dict(num_heads=2, registers=2, layer_scale=0.5, attention='cudnn')
    model = models.build(name, num_classes=5, width=32, depth=2, mlp_dim=64, **fields)
    params = jax.jit(model.init)(jax.random.key(1), np.zeros((1, 64, 64, 3)))['params']
    params['head']['kernel'] += np.random.default_rng(0).normal(size=params['head']['kernel'].shape)
    data = export.serialised(export.exported(model, params, (64, 64)), {})
    found = jax.export.deserialize(data).call(photographs[:2])
    model = model if name.startswith('mixer') else model.clone(attention='xla')
    wanted = by_view(model, params, photographs[:2], size=64)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize('name', ['vit-ti/16', 'mixer-s/16'])
def test_its_blocks_are_a_loop_wherever_it_is_made(name, monkeypatch):
    fields = dict(tokens_mlp_dim=8) if name.startswith('mixer') else dict(num_heads=2)
    model = models.build(name, num_classes=5, width=32, depth=3, mlp_dim=64, **fields)
    params = jax.eval_shape(model.init, jax.random.key(1), np.zeros((1, 64, 64, 3)))['params']
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)

    def loops(**changes):
        made = export.exported(model.clone(**changes), params, (64, 64))
        return made.mlir_module().count('stablehlo.while')

    here = loops()
    monkeypatch.setattr(memory, 'target', lambda: ('tpu', 'TPU v4'))
    assert loops() == here == 1 + loops(unroll=3)


@pytest.mark.slow
def test_the_compiler_of_tpus_takes_it():
    """As it is in the file, which is for other platforms, too."""
    pytest.importorskip('libtpu')
    model, params = small()
    data = export.serialised(export.exported(model, params, (SIZE, SIZE)), {})
    (device, *_), _ = topologies.get_devices('v4:2x2x1')
    images = jax.ShapeDtypeStruct(
        (3, 100, 120, 3), jnp.uint8, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    text = jax.jit(jax.export.deserialize(data).call).lower(images).compile().as_text()
    assert f'f32[3,{len(CLASSES)}]' in text
    call, hard = windows((518, 518))
    for h in hard[:4]:  # a TPU has no float64, and need not have: the window is a constant
        images = jax.ShapeDtypeStruct((h, h), jnp.uint8, sharding=images.sharding)
        text = jax.jit(call).lower(images).compile().as_text()
        side, _ = central.window(h, h, (518, 518), 0.875)
        assert f'constant({side})' in text and 'f64' not in text


@pytest.mark.slow
def test_a_run_is_exported_with_its_view_and_the_parameters_that_are_asked_for(tmp_path):
    folder, run, file = tmp_path / 'images', tmp_path / 'run', tmp_path / 'model.jaxexport'
    launched.write_images(folder, {'train': 8, 'val': 5})
    status, output = launched.finish(folder, run)
    assert status == 0, output
    images = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob('val/*/*.png'))])
    images = images[:, 1:9]  # of the model's own size, where resizing rounds no pixel
    for flags, ema in ((), True), (('--noema',), False):
        about = exported(run, file, '--platforms=cpu', '--force', *flags)
        assert about['classes'] == ['ant', 'bee', 'cat'] and about['view'] == 'resize'
        found = alone(file, tmp_path, images=images)['images']
        wanted = by_view(*vit_jax.load(run, ema=ema), images, 'resize', 8)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        other = by_view(*vit_jax.load(run, ema=not ema), images, 'resize', 8)
        assert np.abs(found - other).max() > 1e-4


@pytest.mark.slow
def test_it_is_written_to_a_store(checkpoint, tmp_path):
    store = stores.Store()
    try:
        arguments = (f'--checkpoint={checkpoint}', '--platforms=cpu')
        address = f'gs://{stores.BUCKET}/models/model.jaxexport'
        status, out, error = command(
            'export', *arguments, f'--out={address}', **store.environment
        )
        assert status == 0 and f'Written: {address}' in out, error
        status, _, error = command(
            'export', *arguments, '--out=gs://nowhere/model', **store.environment
        )
        assert status == 2 and 'gs://nowhere/model' in error and len(error.splitlines()) == 1, error
    finally:
        store.close()
