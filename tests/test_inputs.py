"""Images of any kind as model input, names of classes, and what a notebook is shown."""

import inspect
import io
import json
import pathlib
import re
import subprocess
import sys

import jax
import launched
import numpy as np
import pytest
from PIL import Image

import vit_jax
from vit_jax import models
from vit_jax.convert import inputs, load
from vit_jax.data import augment, decoding, files, tasks
from vit_jax.errors import UserError
from vit_jax.models.text import Text

SIZE, CLASSES = 32, ('ant', 'bee', 'cat', 'dog', 'eel')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A folder in the format of timm, with names of classes and a mean and deviation of its own."""
    model = models.build(
        'vit-ti/16', num_classes=len(CLASSES), width=32, depth=1, num_heads=2, mlp_dim=32,
        gelu='exact', mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3),
    )  # fmt: skip
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), 'f'))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp('checkpoint') / 'timm'
    vit_jax.save(path, model, params['params'], 'timm', image_size=SIZE, classes=CLASSES)
    return path


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """{kind: path} of files of every kind of colour, of odd sizes."""
    folder = tmp_path_factory.mktemp('photographs')
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 256, (41, 57, 3)).astype(np.uint8)
    colour = np.asarray(Image.fromarray(colour).resize((114, 82), Image.Resampling.BICUBIC))
    alpha = np.dstack([colour, np.linspace(0, 255, colour[..., 0].size).reshape(82, 114)])
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = {
        'colour.png': (colour, {}), 'grey.png': (colour[..., 0], {}),
        'deep.png': (colour[..., 0].astype(np.uint16) * 257, {}),
        'alpha.png': (alpha.astype(np.uint8), {}), 'colour.jpg': (colour, dict(quality=95)),
        'turned.jpg': (colour, dict(exif=turned)), 'small.png': (colour[:19, :25], {}),
    }  # fmt: skip
    for name, (pixels, options) in pictures.items():
        Image.fromarray(pixels).save(folder / name, **options)
    Image.fromarray(colour).convert('CMYK').save(folder / 'cmyk.jpg')
    return {path.stem + path.suffix: path for path in folder.iterdir()}


def fed(found, path):
    """What predict feeds: the pixels of a file in the view of the checkpoint, normalised."""
    view = tasks.make_view(found.view, found.image_size)
    return np.asarray(found.model.normalise(files.pixels(path, view)[None]))


def test_files_pictures_and_arrays_are_what_predict_feeds(checkpoint, photographs):
    found = load.read(checkpoint, values=False)
    model, params = vit_jax.load(checkpoint)
    for path in photographs.values():
        wanted = fed(found, path)
        assert wanted.shape == (1, SIZE, SIZE, 3) and np.ptp(wanted) > 1
        for source in (checkpoint, model, (model, params)):
            ours = vit_jax.preprocess(source, path)
            assert ours.dtype == np.float32
            np.testing.assert_array_equal(ours, wanted)
        with Image.open(path) as picture:
            np.testing.assert_array_equal(vit_jax.preprocess(model, picture), wanted)
    several = vit_jax.preprocess(model, [str(photographs[n]) for n in sorted(photographs)])
    wanted = np.concatenate([fed(found, photographs[n]) for n in sorted(photographs)])
    np.testing.assert_array_equal(several, wanted)
    folder = photographs['grey.png'].parent
    np.testing.assert_array_equal(vit_jax.preprocess(model, folder), wanted)


def test_arrays_of_every_kind(checkpoint, photographs):
    model, _ = vit_jax.load(checkpoint)
    colour = np.asarray(Image.open(photographs['colour.png']))
    wanted = np.asarray(vit_jax.preprocess(model, photographs['colour.png']))

    def assert_is(image, wanted):
        np.testing.assert_array_equal(vit_jax.preprocess(model, image), wanted)

    opaque = np.dstack([colour, np.full_like(colour[..., 0], 255)])
    for image in (colour, colour / 255, np.float16(colour / 255), jax.numpy.asarray(colour),
                  colour.astype(np.uint16) * 257, colour[None], [colour], opaque):  # fmt: skip
        assert_is(image, wanted)
    assert_is(np.stack([colour, colour]), np.concatenate([wanted, wanted]))
    assert_is([colour, photographs['colour.png']], np.concatenate([wanted, wanted]))
    grey = np.asarray(vit_jax.preprocess(model, photographs['grey.png']))
    assert_is(colour[..., 0], grey)
    assert_is(colour[..., :1] / 255.0, grey)
    alpha = np.asarray(Image.open(photographs['alpha.png']))
    assert_is(alpha, np.asarray(vit_jax.preprocess(model, photographs['alpha.png'])))


def test_what_is_no_image_is_refused_in_one_line(checkpoint, tmp_path):
    model, _ = vit_jax.load(checkpoint)
    colour = np.full((9, 7, 3), 200, np.uint8)
    (tmp_path / 'text.png').write_text('no picture')
    cases = [
        (colour.astype(np.float32), 'values from 200 to 200; give uint8'),
        (colour / 255 - 1, 'normalised already goes to model.apply'),
        (np.full((9, 7, 3), np.nan), 'values from nan'), (colour.astype(np.int64), 'dtype int64'),
        (colour > 3, 'dtype bool'), (colour.astype(np.uint16), 'as 8 bits have them'),
        (colour.transpose(2, 0, 1), '[3, 9, 7], not [H, W, 3]'), (colour[0, 0], '[3]'),
        (colour[:0], '[0, 7, 3]'), (np.zeros((9, 7, 5), np.uint8), '[9, 7, 5]'), ([], 'no image'),
        ([[1, 2], [3, 4]], 'list is not an image'), (None, 'NoneType is not an image'),
        (3, 'int is not an image'),
        (tmp_path / 'text.png', 'text.png'), (tmp_path / 'none.png', 'none.png'),
        ({'a.png': 1}, 'dict is not an image; give the path'), (b'...', 'bytes is not an image'),
        (io.BytesIO(b'...'), 'BytesIO is not an image; give the path of a file, a PIL image'),
    ]  # fmt: skip
    for image, words in cases:
        with pytest.raises(UserError, match=re.escape(words)) as e:
            vit_jax.preprocess(model, image)
        assert '\n' not in str(e.value)
    for source, words in ((3, 'int is neither a model'), (tmp_path / 'no', 'no')):
        with pytest.raises(UserError, match=words):
            vit_jax.preprocess(source, colour)
    built = models.build('vit-ti/16')
    with pytest.raises(UserError, match='give image_size='):
        vit_jax.preprocess(built, colour)
    assert vit_jax.preprocess(built, colour, image_size=(32, 48)).shape == (1, 32, 48, 3)


def test_an_opened_file_is_what_its_file_shows():
    """Also where Pillow takes it otherwise: palettes of 8 bits, key colours, XMP, odd EXIF."""
    seen = 0
    for file in sorted((pathlib.Path(__file__).with_name('data') / 'images').iterdir()):
        try:
            picture = Image.open(file)
        except (OSError, ValueError):  # those that Pillow alone does not open
            continue
        with picture:
            wanted = decoding.decode(file.read_bytes())
            np.testing.assert_array_equal(inputs.to_pixels(picture), wanted, err_msg=file.name)
            seen += 1
    assert seen >= 9


def test_pictures_made_of_arrays_have_the_range_of_these():
    values = np.arange(16, dtype=np.int32).reshape(4, 4)
    picture = Image.fromarray(values * 4096)
    np.testing.assert_array_equal(inputs.to_pixels(picture)[..., 0], values * 16)
    for wrong in (values, values * 16, values * 70_000, values - 1):
        with pytest.raises(UserError, match='has values from'):
            inputs.to_pixels(Image.fromarray(wrong))


@pytest.mark.parametrize('view, words', [
    (3, 'view is 3'), ('zoom', "no view 'zoom'"), (dict(name='resize', crop='x'), 'view.crop is'),
    (dict(name='resize', size=3), "no argument of the view resize 'size'"),
    (dict(name='central', crop=0), 'view.crop is 0'), (dict(crop=0.5), 'no view None'),
])  # fmt: skip
def test_a_view_that_is_none_is_named(view, words, checkpoint, tmp_path):
    model, params = vit_jax.load(checkpoint)
    pixels = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=words):
        vit_jax.preprocess(model, pixels, view=view)
    with pytest.raises(UserError, match=words):
        vit_jax.save(tmp_path / 'a', model, params, 'timm', view=view)


def test_what_save_and_apply_can_not_take_is_named(checkpoint, tmp_path):
    model, params = vit_jax.load(checkpoint)
    names = 'x' * model.num_classes
    for wrong, words in (
        (dict(classes=names), 'classes is'), (dict(classes=range(len(names))), 'classes is'),
        (dict(config=3), 'config is 3'), (dict(image_size=70_000), 'image_size is 70000'),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            vit_jax.save(tmp_path / 'a', model, params, 'timm', **wrong)
    with pytest.raises(UserError, match='capture is None'):
        model.apply({'params': params}, np.zeros((1, SIZE, SIZE, 3), 'f'), capture=None)


def test_size_and_view_can_be_chosen(checkpoint, photographs):
    model, _ = vit_jax.load(checkpoint, image_size=64)
    path = photographs['colour.png']
    whole = vit_jax.preprocess(model, path, view='resize')
    assert whole.shape == (1, 64, 64, 3)
    part = vit_jax.preprocess(model, path, view=dict(name='central', crop=0.5))
    assert np.abs(whole - part).max() > 0.1
    with pytest.raises(UserError, match="'nowhere'"):
        vit_jax.preprocess(model, path, view='nowhere')
    refused = set()
    for name in augment.VIEWS:  # those that draw are refused, the others need no generator
        try:
            augment.VIEWS[name]((9, 7), None, size=(4, 4))
        except AttributeError:
            refused.add(name)
            with pytest.raises(UserError, match=f'view {name} draws at random; give one of cent'):
                vit_jax.preprocess(model, path, view=dict(name=name))
    assert refused == augment.VIEWS.keys() - set(augment.FIXED) >= {'inception', 'shift'}


def test_a_loaded_model_carries_what_its_checkpoint_says(checkpoint, tmp_path):
    model, params = vit_jax.load(checkpoint)
    assert vit_jax.class_names(model) == vit_jax.class_names(checkpoint) == CLASSES
    assert vit_jax.class_names((model, params)) == CLASSES
    assert model.metadata.image_size == (SIZE, SIZE)
    same = model.clone(metadata=None)
    assert same == model and hash(same) == hash(model)  # a compiled step serves both
    assert vit_jax.class_names(same) is None
    assert vit_jax.class_names(model.clone(num_classes=3)) is None
    assert vit_jax.class_names(vit_jax.load(checkpoint, num_classes=3)[0]) is None
    vit_jax.save(tmp_path / 'again', model, params, 'hf')
    assert vit_jax.class_names(tmp_path / 'again') == CLASSES
    assert load.read(tmp_path / 'again', values=False).image_size == (SIZE, SIZE)


def test_arguments_of_load_and_save_that_are_none_are_named(checkpoint, tmp_path):
    model, params = vit_jax.load(checkpoint)
    for path, fields, words in (
        (None, {}, 'the checkpoint is None, not a path'), ('', {}, "the checkpoint is '', not a"),
        (checkpoint, dict(img_size=32), "no argument 'img_size'; the nearest is 'image_size'"),
        (checkpoint, dict(numclasses=3), "'numclasses'; the nearest is 'num_classes'"),
        (checkpoint, dict(widht=3), "no field 'widht'; the nearest is 'width'"),
    ):
        with pytest.raises(UserError, match=words):
            vit_jax.load(path, **fields)
    for arguments, words in (
        ((model, params, tmp_path / 'x'), 'a path, a model and its parameters, in this'),
        ((tmp_path / 'x', params, model), 'a path, a model and its parameters, in this'),
        ((tmp_path / 'x', model, {'params': params}), "returns them: variables\\['params'\\]"),
        ((tmp_path / 'x', model, None), 'give the parameters as load returns them'),
    ):
        with pytest.raises(UserError, match=words):
            vit_jax.save(*arguments, format='timm')
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_is_shown_what_there_is():
    """In a new process, where nothing was imported yet."""
    code = (
        'import vit_jax; names = dir(vit_jax); from vit_jax import *; '
        'print(*names); print(preprocess.__name__, models.build.__name__)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=launched.ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    names = done.stdout.split('\n')[0].split()
    assert {'load', 'save', 'preprocess', 'class_names', 'tokenizer', 'models'} <= set(names)
    assert done.stdout.split('\n')[1] == 'preprocess build'
    for name in ('load', 'save', 'preprocess', 'class_names', 'tokenizer'):
        function = getattr(vit_jax, name)
        signature = inspect.signature(function)
        assert len(function.__doc__) > 80 and signature.return_annotation is not signature.empty
        assert all(p.annotation is not p.empty for p in signature.parameters.values()), name
    for kind in models.KINDS:
        inputs = 'Token ids' if kind is Text else 'normalised floats'
        assert inputs in kind.__doc__ and 'pre_logits' in kind.__doc__
        assert kind.__call__.__doc__ and kind.normalise.__doc__
        shown = str(inspect.signature(kind))  # which help() prints
        assert 'Annotated[int, above 0]' in shown and 'Range(' not in shown
    assert pathlib.Path(vit_jax.__file__).name == '__init__.py'


@pytest.mark.slow
def test_features_of_a_folder(checkpoint, photographs, tmp_path):
    folder, out = tmp_path / 'mine', tmp_path / 'features.npz'
    (folder / 'deep' / 'er').mkdir(parents=True)
    for where, name in (('.', 'colour.png'), ('deep', 'grey.png'), ('deep/er', 'cmyk.jpg')):
        (folder / where / name).write_bytes(photographs[name].read_bytes())
    (folder / 'deep' / 'broken.png').write_bytes(b'no picture')

    def run(*arguments):
        return subprocess.run(
            [sys.executable, '-m', 'vit_jax.predict', f'--checkpoint={checkpoint}',
             f'--features={out}', *arguments, folder],
            capture_output=True, text=True, env=launched.ENVIRONMENT,
        )  # fmt: skip

    done = run()
    assert done.returncode == 2 and 'broken.png' in done.stderr and '1 of 4' in done.stderr
    with np.load(out, allow_pickle=False) as found:
        names, features = list(found['files']), found['features']
    assert names == [
        str(folder / name) for name in ('colour.png', 'deep/er/cmyk.jpg', 'deep/grey.png')
    ]
    model, params = vit_jax.load(checkpoint)
    _, wanted = jax.jit(model.apply)({'params': params}, vit_jax.preprocess(model, names))
    assert features.dtype == np.float32 and np.ptp(features, axis=0).max() > 0.01
    np.testing.assert_allclose(features, wanted['pre_logits'], atol=1e-4)
    before = out.read_bytes()
    done = run('--top=1')
    assert done.returncode == 2 and str(out) in done.stderr and '--force' in done.stderr
    assert out.read_bytes() == before


@pytest.mark.slow
def test_images_have_the_size_that_the_processor_makes_everywhere(photographs, tmp_path):
    """As of DINOv2: positions for images of one size, a processor that makes another, odd one."""
    model = models.build(
        'vit-ti/14', num_classes=len(CLASSES), width=32, depth=1, num_heads=2, mlp_dim=128,
        gelu='exact', layer_scale=1.0,
    )  # fmt: skip
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 70, 70, 3), 'f'))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    folder, out = tmp_path / 'dinov2', tmp_path / 'one.export'
    vit_jax.save(folder, model, params['params'], 'hf', image_size=70, classes=CLASSES)
    settings = dict(
        image_processor_type='BitImageProcessor', size=dict(shortest_edge=64), crop_size=45
    )
    (folder / 'preprocessor_config.json').write_text(json.dumps(settings))
    path = photographs['colour.png']

    model, params = vit_jax.load(folder)
    images = vit_jax.preprocess(model, path)
    assert images.shape == (1, 42, 42, 3) and model.metadata.image_size == (42, 42)
    np.testing.assert_array_equal(vit_jax.preprocess(folder, path), images)
    logits, _ = jax.jit(model.apply)({'params': params}, images)
    wanted = jax.nn.softmax(logits)[0]
    for size in (84, (56, 84)):  # the side before the crop grows, whatever is handed over
        larger, _ = vit_jax.load(folder, image_size=size)
        images = vit_jax.preprocess(larger, path)
        for source in (folder, model):
            again = vit_jax.preprocess(source, path, image_size=size)
            np.testing.assert_array_equal(again, images)

    def run(module, *arguments):
        done = subprocess.run(
            [sys.executable, '-m', f'vit_jax.{module}', f'--checkpoint={folder}', *arguments],
            capture_output=True, text=True, env=launched.ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    rows = json.loads(run('predict', '--json', path))['top']
    found = [row['probability'] for row in sorted(rows, key=lambda row: row['index'])]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    run('export', f'--out={out}', '--platforms=cpu')
    exported = jax.export.deserialize(bytearray(out.read_bytes()))
    pixels = np.asarray(Image.open(path))[None]
    np.testing.assert_allclose(exported.call(pixels)[0], wanted, atol=0.02)
    table = load.read(folder, values=False)  # what is converted or trained on is the file's own
    assert table.image_size == (70, 70) and 'ignored' in {row[0] for row in table.account}
