"""JSON files of every family that are wrong: a refusal in one line, and no memory for it."""

import json
import logging
import random
import shutil
from functools import partial

import fuzz_files
import jax
import numpy as np
import pytest
from recorded import DATA, FIXTURES, location
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import vit_jax
from vit_jax.convert import hf, load, open_clip, timm
from vit_jax.convert.timm import beit, bit, eva_model, mixer, naflex, relpos, vit_model
from vit_jax.convert.timm import config as timm_config
from vit_jax.errors import UserError
from vit_jax.models import block, relative, rotary

FOLDERS = [n for n in FIXTURES if (DATA / n).is_dir()] + ['open_clip']
OF_TRANSFORMERS = {  # {model_type: fields of a model that is saved as one}
    'dinov3_vit': dict(style=block.Style(rope=rotary.Rope()), posemb='none', layer_scale=1.0),
    'aimv2_vision_model': dict(style=block.Style(norm='rms'), glu=True, patch_norm=True,
                               pool='gap'),
    'beit': dict(style=block.Style(unbiased=('key',), bias=relative.Bias(interpolation='linear')),
                 posemb='none'),
    'blip_vision_model': dict(pool='none', cls_token=True),
    'pixio': dict(pool='none', registers=2, registers_posemb=True),
    'dinov2_with_registers': dict(layer_scale=1.0, registers=2),
}  # fmt: skip
KEYS = {  # that a file may leave out, by where they are
    ('config.json',): ('architecture', 'model_type', 'id2label', 'architectures', 'vision_config',
                       'backbone_config', *hf.vit.READ, *hf.towers.READ, *hf.beit.READ),
    ('config.json', 'model_args'): sorted({
        key for c in (beit, bit, eva_model, mixer, naflex, relpos, vit_model)
        for key in c.SIGNATURE.defaults
    }),
    ('config.json', 'pretrained_cfg'): timm_config.READ,
    (open_clip.FILE, 'model_cfg', 'vision_cfg'): open_clip.READ['vision_cfg'],
    (open_clip.FILE, 'preprocess_cfg'): open_clip.READ['preprocess_cfg'],
    ('preprocessor_config.json',): hf.processor.READ,
}  # fmt: skip
VALUES = [v for v in fuzz_files.VALUES if v != 10**4000] + [
    'x' * 5000, {'approximate': []}, {'model_type': 'x'}, [{}, []],
]  # fmt: skip


@pytest.fixture(scope='module', params=[*FOLDERS, *OF_TRANSFORMERS])
def folder(request, tmp_path_factory):
    """A copy of a checkpoint of the family."""
    name, path = request.param, tmp_path_factory.mktemp('folder') / 'x'
    if name in OF_TRANSFORMERS:
        return of_transformers(name, path)
    shutil.copytree(location(name), path)
    return path


def of_transformers(name, path):
    """A model that is saved as one of a model type of transformers."""
    model = fuzz_files.tiny(num_classes=None, gelu='exact', **OF_TRANSFORMERS[name])
    vit_jax.save(path, model, fuzz_files.parameters(model), 'hf', image_size=16, view='resize')
    assert json.loads((path / 'config.json').read_text())['model_type'] == name
    return path


def places(value, at):
    """Paths of all that a JSON value at a path holds, or might hold."""
    yield at
    if isinstance(value, dict):
        for key in sorted({*value, *KEYS.get(at, ())}):
            yield from places(value.get(key), (*at, key))


def replaced(value, at, new):
    """A JSON value with another one at a path."""
    return new if not at else value | {at[0]: replaced(value.get(at[0]), at[1:], new)}


def class_of(name):
    """The class of timm that reads a folder, None if none does."""
    if name not in FIXTURES:
        return None
    config = json.loads((DATA / name / 'config.json').read_text())
    if (DATA / name / 'arrays.json').exists():
        return timm.class_of_file(json.loads((DATA / name / 'arrays.json').read_text()), config)
    with safe_open(DATA / name / 'model.safetensors', 'numpy') as arrays:
        return timm.class_of_file(arrays.keys(), config)


def unread(loaded, key):
    """Whether a key of a document is one that its family does not know."""
    return any(why == 'an unknown key' and name.split(': ')[-1].split('.')[-1] == key
               for _, name, why in loaded.account)  # fmt: skip


def check(folder, cases):
    """Replaces a value of a JSON file for each case, a place and values, in turn.

    Other values at a place which the family does not read are skipped. Returns how many values are
    refused.
    """
    part = 'image' if (folder / open_clip.FILE).exists() else None
    documents = {p.name: p.read_text() for p in folder.glob('*.json')}
    refused = 0
    for at, values in cases:
        file, (name, *inside) = folder / at[0], at
        for value in values:
            file.unlink()  # a file that is written over waits for its disk
            file.write_text(json.dumps(replaced(json.loads(documents[name]), inside, value)))
            loaded = []
            try:
                message = fuzz_files.refusal(partial(read, folder, part, loaded))
            except Exception as e:
                raise AssertionError(f'{at} is {value!r:.99}') from e
            assert message is None or len(message) < 1000, message
            refused += message is not None
            if loaded and unread(loaded[0], at[-1]):
                break
        file.write_text(documents[name])
    return refused


def read(folder, part, into):
    """Appends what is loaded to a list."""
    into.append(load.read(folder, values=False, part=part))


def all_places(folder):
    """Paths of all values in the JSON files of a folder, and of those that they might hold."""
    documents = {p.name: json.loads(p.read_text()) for p in folder.glob('*.json')}
    return [at for name, document in documents.items() for at in places(document, (name,))]


@pytest.fixture
def quiet(caplog):
    """Without messages: pytest formats each of them, which takes longer than the reading."""
    with caplog.at_level(logging.ERROR, 'absl'):
        yield


def test_a_value_of_any_kind_is_read_or_refused(folder, quiet):
    rng = random.Random(0)
    cases = rng.sample([(at, [value]) for at in all_places(folder) for value in VALUES], 25)
    assert check(folder, cases) > 3


@pytest.mark.slow
def test_every_value_of_any_kind_is_read_or_refused(folder, quiet, request):
    """Each value at each place, once among four files that one class of timm reads."""
    name = request.node.callspec.params['folder']
    of_class = class_of(name)
    group = [n for n in FOLDERS if class_of(n) is of_class] if of_class else [name]
    stride = min(len(group), 4)
    check(folder, [(at, VALUES[group.index(name) % stride::stride]) for at in all_places(folder)])


@pytest.mark.parametrize('name, key, value', [
    ('beit', 'use_relative_position_bias', False), ('beit', 'layer_scale_init_value', 0.1),
    ('beit', 'use_mean_pooling', True), ('beit', 'num_channels', 1),
    ('dinov3_vit', 'key_bias', False), ('dinov3_vit', 'use_gated_mlp', True),
    ('dinov3_vit', 'num_register_tokens', 3), ('aimv2_vision_model', 'qkv_bias', False),
    ('aimv2_vision_model', 'is_native', True), ('aimv2_vision_model', 'image_size', 20),
    ('blip_vision_model', 'intermediate_size', 40), ('pixio', 'n_cls_tokens', 1),
])  # fmt: skip
def test_a_key_that_the_arrays_contradict_is_named(name, key, value, tmp_path):
    folder = of_transformers(name, tmp_path / 'x')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=f'{key} is .* but the (arrays have|position table has)'):
        load.read(folder, values=False)


HUGE = {  # settings of images with more patches than anyone means
    'naflex_gap': dict(input_size=[3, 16384, 16384]),
    'timm_srelpos': dict(input_size=[3, 4096, 4096]),
}


@pytest.mark.parametrize('name', HUGE)
def test_settings_take_no_memory(name, tmp_path):
    shutil.copytree(location(name), tmp_path / 'x')
    path = tmp_path / 'x' / 'config.json'
    config = json.loads(path.read_text())
    config['pretrained_cfg'] |= HUGE[name]
    config['model_args'].pop('img_size', None)
    path.write_text(json.dumps(config))
    with fuzz_files.limited(), pytest.raises(UserError, match='patches; if that is meant, give'):
        vit_jax.load(tmp_path / 'x')


def test_factors_of_a_table_take_no_memory(tmp_path):
    """Positions of rows and of columns have far fewer numbers than their sum."""
    shutil.copytree(location('naflex_factorised'), tmp_path / 'x')
    weights, path = tmp_path / 'x' / 'model.safetensors', tmp_path / 'x' / 'config.json'
    arrays = load_file(weights)
    for name in ('embeds.pos_embed_y', 'embeds.pos_embed_x'):
        arrays[name] = np.zeros((1, 9999, arrays[name].shape[2]), np.float16)
    save_file(arrays, weights)
    config = json.loads(path.read_text())
    config['model_args']['pos_embed_grid_size'] = [9999, 9999]
    path.write_text(json.dumps(config))
    with fuzz_files.limited(), pytest.raises(UserError, match='of 9999 x 9999 patches, at most'):
        load.read(tmp_path / 'x')


def test_shapes_of_biases_by_offset_take_no_memory():
    model = fuzz_files.tiny(style=block.Style(bias=relative.Bias('mlp')), posemb='none')
    images = jax.ShapeDtypeStruct((1, 8192, 8192, 3), np.float32)
    with fuzz_files.limited():
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    assert shapes['encoder']['attn']['bias_fc1']['kernel'].shape[1] == 2
