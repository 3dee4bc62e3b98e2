"""What is exported, another library's own pipeline reads from the disk and reproduces."""

import json
import math
import os
import re
import stat
import subprocess
import sys

import jax
import launched
import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images

import vit_jax
from vit_jax import models
from vit_jax.convert import load, views
from vit_jax.data import files as named
from vit_jax.data import tasks
from vit_jax.errors import UserError

SIZE, CLASSES = 48, ('ant', 'bee', 'cat', 'dog', 'eel')
VIEWS = {
    'central': 'central',
    'narrow': dict(name='central', crop=0.857, method='bicubic'),
    'whole': dict(name='central', crop=1.0),
    'resize': 'resize',
    'small': dict(name='small_central', smaller=56, method='bilinear', antialias=True),
}


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """JPEG and PNG files, colour and grey, of odd aspects, larger and smaller than the size.

    They are blurred, so that half a pixel of the input counts little and another window much.
    """
    folder = tmp_path_factory.mktemp('photographs')
    china, flower = load_sample_images().images
    pieces = [china[:300, :411], flower[:427, :131], china[60:259], flower[200:230, 200:243],
              china[:211, :57], flower[100:197, 300:413]]  # fmt: skip
    for i, piece in enumerate(pieces):
        for mode in ('RGB', 'L'):
            image = Image.fromarray(np.ascontiguousarray(piece)).convert(mode)
            image = image.filter(ImageFilter.GaussianBlur(min(image.size) / 15))
            image.save(folder / f'{i}{mode}.png')
            image.save(folder / f'{i}{mode}.jpg', quality=92)
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope='module')
def network(photographs):
    """(model, parameters) that tell the photographs well apart: logits of deviation 2."""
    model = models.build(
        'vit-ti/8', num_classes=len(CLASSES), width=48, depth=2, num_heads=3, mlp_dim=96,
        gelu='tanh', mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3),
    )  # fmt: skip
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), 'f'))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.15, x.shape).astype('f'), shapes)['params']
    images = vit_jax.preprocess(model, photographs, image_size=SIZE)
    logits, _ = jax.jit(model.apply)({'params': params}, images)
    by = 2 / np.std(logits - logits.mean(axis=1, keepdims=True), axis=0)
    bias = (params['head']['bias'] - np.mean(logits, axis=0)) * by
    params['head'] = dict(kernel=params['head']['kernel'] * by, bias=bias)
    return model, jax.tree.map(np.asarray, params)


def assert_reproduced(theirs, ours, view):
    """Where the image is cut before it is resized, within what the other order makes of it."""
    difference = np.abs(theirs - ours).max(axis=1)
    mean, most = (0.005, 0.02) if view in ('resize', VIEWS['small']) else (0.02, 0.06)
    assert difference.mean() < mean and difference.max() < most, difference


def probabilities(model, params, photographs, view):
    images = vit_jax.preprocess(model, photographs, image_size=SIZE, view=view)
    logits, _ = jax.jit(model.apply)({'params': params}, images)
    return np.asarray(jax.nn.softmax(logits))


def test_the_pipeline_of_transformers(network, photographs, tmp_path):
    pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    squeezed = probabilities(*network, photographs, 'resize')
    for name, view in VIEWS.items():
        vit_jax.save(
            tmp_path / name, *network, 'hf', image_size=SIZE, classes=CLASSES, view=view
        )
        pipeline = transformers.pipeline('image-classification', model=str(tmp_path / name))
        rows = pipeline(photographs, top_k=len(CLASSES))
        theirs = [{row['label']: row['score'] for row in found} for found in rows]
        theirs = np.array([[found[name] for name in CLASSES] for found in theirs])
        ours = probabilities(*network, photographs, view)
        assert_reproduced(theirs, ours, view)
        if view != 'resize':  # or else nothing would be told apart
            assert np.abs(ours - squeezed).max() > 0.2


def test_the_pipeline_of_timm(network, photographs, tmp_path):
    timm = pytest.importorskip('timm')
    import torch

    for name, view in VIEWS.items():
        vit_jax.save(
            tmp_path / name, *network, 'timm', image_size=SIZE, classes=CLASSES, view=view
        )
        module = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True).eval()
        settings = timm.data.resolve_model_data_config(module)
        transform = timm.data.create_transform(**settings, is_training=False)
        batch = torch.stack([transform(Image.open(p).convert('RGB')) for p in photographs])
        with torch.no_grad():
            theirs = torch.softmax(module(batch), -1).numpy()
        assert_reproduced(theirs, probabilities(*network, photographs, view), view)


def test_the_size_that_timm_resizes_to_is_the_one_that_was_meant():
    for size in (32, 48, 96, 224, 299, 384, 518):
        for crop in (0.5, 0.8, 0.857, 0.875, 0.9, 0.95, 0.965, 1.0):
            settings, _ = views.pretrained_settings(dict(name='central', crop=crop), (size, size))
            assert math.floor(size / settings['crop_pct']) == round(size / crop), (size, crop)
    settings, _ = views.pretrained_settings('central', (224, 224))
    assert settings == dict(crop_pct=0.875, crop_mode='center', interpolation='bilinear')


EXACT = [  # views that both libraries have to the pixel, with their own rounding
    dict(name='resize'), dict(name='resize', method='bicubic'), dict(name='resize', crop=0.875),
    dict(name='resize', crop=0.8, method='bicubic'),
    dict(name='small_central', smaller=55, method='bilinear', antialias=True),
    dict(name='small_central', smaller=48, method='bicubic', antialias=True),
    dict(name='small_central', smaller=77, method='bicubic', antialias=True),
]


def by_transformers(folder, config):
    """path -> the input [H, W, 3] that transformers makes of a file, in grey levels."""
    transformers = pytest.importorskip('transformers')
    processor = transformers.AutoImageProcessor.from_pretrained(folder)

    def seen(path):
        values = processor(Image.open(path).convert('RGB'), return_tensors='np')['pixel_values'][0]
        mean, std = np.array(processor.image_mean), np.array(processor.image_std)
        return (values.transpose(1, 2, 0) * std + mean) * 255

    return seen


def by_timm(folder, config):
    """Likewise what timm's settings mean: torchvision's Resize and CenterCrop, by Pillow."""
    settings = config['pretrained_cfg']
    size = settings['input_size'][1:]
    filter = getattr(Image.Resampling, settings['interpolation'].upper())
    whole = [math.floor(n / settings['crop_pct']) for n in size]

    def seen(path):
        image = Image.open(path).convert('RGB')
        w, h = image.size
        if settings['crop_mode'] == 'squash':
            h, w = whole
        else:
            h, w = (int(whole[0] * max(n / m, 1)) for n, m in ((h, w), (w, h)))
        out = np.asarray(image.resize((w, h), filter))
        y, x = round((h - size[0]) / 2), round((w - size[1]) / 2)
        return out[y : y + size[0], x : x + size[1]].astype(float)

    return seen


@pytest.mark.parametrize('format, rounding, theirs', [
    ('hf', 'transformers', by_transformers), ('timm', 'torchvision', by_timm),
], ids=['hf', 'timm'])  # fmt: skip
def test_what_they_have_too_is_the_same_to_the_pixel(
    format, rounding, theirs, network, tmp_path, capfd
):
    """On sharp images: any other place or filter differs by tens of grey levels."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    pictures = {
        'large.jpg': china, 'tall.png': flower.resize((301, 555)),
        'small.png': china.resize((60, 81)),
        'wide.png': flower.resize((533, 211)), 'grey.jpg': china.convert('L').resize((385, 256)),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(tmp_path / name, quality=90)
    for i, view in enumerate(EXACT):
        folder, view = tmp_path / str(i), view | dict(rounding=rounding)
        vit_jax.save(folder, *network, format, image_size=SIZE, view=view)
        seen = theirs(folder, json.loads((folder / 'config.json').read_text()))
        back = load.read(folder).view
        for name in pictures:
            path = tmp_path / name
            ours = pixels(path, view)
            # They round between the two axes; JPEGs that shrink are decoded smaller here.
            apart = np.abs(ours - seen(path))
            assert apart.mean() < 1 and apart.max() < 12, (view, name)
            assert np.array_equal(ours, pixels(path, back)), (view, back)
    assert 'prepares images' not in capfd.readouterr().err


def pixels(path, view):
    return named.pixels(path, tasks.make_view(view, SIZE)).astype(float)


@pytest.mark.parametrize('format', ['official', 'hf', 'timm'])
def test_a_view_comes_back(format, network, tmp_path):
    model = network[0].clone(mean=(0.5,) * 3, std=(0.5,) * 3)
    path = tmp_path / ('a.npz' if format == 'official' else 'a')
    view = dict(name='small_central', smaller=60, method='bicubic', antialias=True)
    view['rounding'] = 'torchvision' if format == 'timm' else 'transformers'
    vit_jax.save(path, model, network[1], format, image_size=SIZE, view=view)
    assert load.read(path).view == view
    assert load.read(path, image_size=96).view == view | dict(smaller=120)
    run = dict(evals=dict(test=dict(view='resize')))  # that of a run comes first
    vit_jax.save(path, model, network[1], format, image_size=SIZE, config=run)
    assert load.read(path).view == 'resize'


def test_a_view_that_a_file_states_is_checked():
    for view in ('nosuch', 5, [], {}, None, dict(name=['resize']), dict(name='resize', crop=7.0),
                 dict(name='resize', nosuch=1), dict(name='resize', size=(1, 1))):  # fmt: skip
        assert views.valid_view(view) is None, view
    for view in ('resize', dict(name='central', crop=0.5)):
        assert views.valid_view(view) is view


@pytest.mark.parametrize('view, words', [
    ('resize', []), (dict(name='resize', crop=0.875), []), ('central', ['before it is cut']),
    (dict(name='resize', antialias=False), ['antialias']),
    ('small_central', ['bilinear filter there, by area here', 'half pixels']),
    (dict(name='shift', pixels=2), ['shift has chance', 'resize stands']),
    ('inception', ['inception has chance', 'central stands', 'before it is cut']),
])  # fmt: skip
def test_what_they_can_not_express_is_said(view, words):
    settings, notes = views.processor_settings(view, (224, 224))
    for word in words:
        assert word in '; '.join(notes)
    assert bool(notes) == bool(words)
    assert settings['do_center_crop'] == (settings['size'] != dict(height=224, width=224))


def command(module, *arguments):
    return subprocess.run(
        [sys.executable, '-m', f'vit_jax.{module}', *map(str, arguments)], capture_output=True,
        text=True, env=launched.ENVIRONMENT, umask=0o027,
    )  # fmt: skip


@pytest.mark.slow
def test_nothing_is_replaced_without_being_asked(network, tmp_path):
    """And what is written has the mode of any file."""
    source = tmp_path / 'source'
    model = network[0].clone(mean=(0.5,) * 3, std=(0.5,) * 3)
    vit_jax.save(source, model, network[1], 'hf', image_size=SIZE, view='central')
    (tmp_path / 'empty').mkdir()
    for name, to in (('empty', 'timm'), ('a.npz', 'official')):
        done = command('convert', source, tmp_path / name, f'--to={to}')
        assert done.returncode == 0, done.stderr
    written = [tmp_path / 'a.npz', tmp_path / 'a.json', *(tmp_path / 'empty').iterdir()]
    assert len(written) == 4
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    config = json.loads((tmp_path / 'empty' / 'config.json').read_text())
    assert config['pretrained_cfg']['crop_pct'] < 1
    (tmp_path / 'b.json').write_text('mine')
    for name, to in (('empty', 'hf'), ('a.npz', 'official'), ('b.npz', 'official')):
        before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
        done = command('convert', source, tmp_path / name, f'--to={to}')
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
        assert '--force' in done.stderr and str(tmp_path) in done.stderr
        assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    done = command('export', f'--checkpoint={source}', f'--out={tmp_path / "b.json"}')
    assert done.returncode == 2 and '--force' in done.stderr
    assert (tmp_path / 'b.json').read_text() == 'mine'
    done = command('convert', source, tmp_path / 'empty', '--to=hf', '--force')
    assert done.returncode == 0, done.stderr
    assert 'preprocessor_config.json' in os.listdir(tmp_path / 'empty')


@pytest.mark.parametrize('pool, fields', [
    ('cls', {}), ('cls', dict(last_norm='pooled')), ('gap', {}), ('cls_gap', dict(registers=2)),
    ('gap', dict(registers=2)),
])  # fmt: skip
def test_a_dinov2_goes_to_transformers_whatever_its_pooling(pool, fields, tmp_path):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    model = dinov2(pool, **fields)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 32, 32, 3)).astype('f')
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype('f'), shapes)
    vit_jax.save(tmp_path / 'hf', model, params, 'hf', image_size=32)
    kind = transformers.AutoModelForImageClassification
    module, info = kind.from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert not any(info.values()) and 'Dinov2' in type(module).__name__
    with torch.no_grad():
        theirs = module.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.numpy()
    for network, weights in ((model, params), vit_jax.load(tmp_path / 'hf')):
        with jax.default_matmul_precision('highest'):
            logits, _ = jax.jit(network.apply)({'params': weights}, images)
        assert np.ptp(logits) > 0.5
        np.testing.assert_allclose(logits, theirs, atol=1e-4)


def dinov2(pool, **fields):
    return models.build(
        'vit-ti/8', num_classes=5, width=48, depth=2, num_heads=3, mlp_dim=96, gelu='exact',
        layer_scale=0.5, **dict(cls_token=True) | fields, pool=pool, interpolation='bicubic',
    )  # fmt: skip


@pytest.mark.parametrize('pool, fields, words', [
    ('map', {}, "pool='map' of this model, only 'cls' or 'gap' or 'cls_gap'; format timm can"),
    ('gap', dict(cls_token=False), 'this model none; timm can'),
    ('gap', dict(last_norm='pooled'),
     "last_norm='pooled' of this model, only 'tokens'; format timm can"),
])  # fmt: skip
def test_a_pooling_that_transformers_has_not_names_the_way_out(pool, fields, words, tmp_path):
    model = dinov2(pool, **fields)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), 'f'))['params']
    with pytest.raises(UserError, match=re.escape(words)):
        vit_jax.save(tmp_path / 'hf', model, params, 'hf', image_size=32)
    vit_jax.save(tmp_path / 'timm', model, params, 'timm', image_size=32)
