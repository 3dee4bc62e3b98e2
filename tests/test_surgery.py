"""Weights fitted to another image size or other classes, and the account of what was done."""

import functools
import itertools
import pathlib
import re
import shutil

import in_process
import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from scipy import ndimage

import vit_jax
from vit_jax import models
from vit_jax.convert import load, surgery
from vit_jax.errors import UserError
from vit_jax.models import resizing

DATA = pathlib.Path(__file__).with_name('data')
PRE_LOGITS = DATA / 'official_vit_prelogits.npz'
GRIDS = [
    ((4, 4), (7, 7)), ((7, 7), (4, 4)), ((14, 14), (24, 24)), ((37, 37), (16, 16)),
    ((3, 5), (6, 4)), ((5, 3), (2, 9)), ((4, 4), (4, 6)), ((1, 6), (1, 9)), ((1, 6), (3, 4)),
    ((6, 1), (2, 1)), ((3, 4), (1, 1)), ((2, 2), (13, 11)),
]  # fmt: skip


def zoomed(grid, new):
    """[h, w, D] at another size by the rule of the official repository."""
    factors = [n / o for n, o in zip(new, grid.shape, strict=False)]
    return ndimage.zoom(grid, (*factors, 1), order=1)


def by_torch(grid, new, antialias, mode='bicubic'):
    """[h, w, D] at another size by PyTorch's filter."""
    torch = pytest.importorskip('torch')
    if grid.shape[1] == new[1] == 1:  # PyTorch 2.13 gets that wrong, and its transpose right
        return by_torch(grid.swapaxes(0, 1), new[::-1], antialias, mode).swapaxes(0, 1)
    x = torch.from_numpy(np.ascontiguousarray(grid.transpose(2, 0, 1)[None]))
    y = torch.nn.functional.interpolate(
        x, size=new, mode=mode, align_corners=False, antialias=antialias
    )
    return y[0].numpy().transpose(1, 2, 0)


REFERENCES = {
    'linear': zoomed,
    'bilinear': functools.partial(by_torch, antialias=False, mode='bilinear'),
    'bilinear_antialias': functools.partial(by_torch, antialias=True, mode='bilinear'),
    'bicubic': functools.partial(by_torch, antialias=False),
    'bicubic_antialias': functools.partial(by_torch, antialias=True),
}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('method', REFERENCES)
@pytest.mark.parametrize('old, new', GRIDS)
def test_each_interpolation_is_its_librarys(method, old, new):
    table = noise(1, 5 + old[0] * old[1], 6)
    resized = surgery.resize(table, old, new, method)
    assert resized.shape == (1, 5 + new[0] * new[1], 6) and resized.dtype == np.float32
    np.testing.assert_array_equal(resized[:, :5], table[:, :5])
    expected = REFERENCES[method](table[0, 5:].reshape(*old, 6), new)
    np.testing.assert_allclose(resized[0, 5:].reshape(*new, 6), expected, atol=2e-5)
    traced = jax.jit(lambda table: resizing.positions(table, old, new, method))(table)
    np.testing.assert_allclose(traced, resized, atol=1e-5)


@pytest.mark.parametrize('old, new', [((4, 4), (8, 6)), ((8, 8), (3, 5)), ((6, 4), (6, 9))])
def test_a_resized_kernel_embeds_resized_patches(old, new):
    """The best kernel by least squares over all patches (arXiv:2212.08013 eq. 3)."""
    torch = pytest.importorskip('torch')
    interpolate = torch.nn.functional.interpolate
    kernel, patches = noise(*old, 3, 5), noise(7, *old, 3, seed=1)
    resized = resizing.kernel(kernel, new)
    larger = interpolate(
        torch.tensor(patches).permute(0, 3, 1, 2), new, mode='bilinear', align_corners=False
    ).permute(0, 2, 3, 1).numpy()  # fmt: skip
    made = np.einsum('nhwc,hwcd->nd', larger, resized)
    wanted = np.einsum('nhwc,hwcd->nd', patches, kernel)
    if min(np.subtract(new, old)) >= 0:
        np.testing.assert_allclose(made, wanted, atol=2e-4)
    basis = interpolate(
        torch.eye(old[0] * old[1]).reshape(1, -1, *old), new, mode='bilinear', align_corners=False
    )[0].reshape(old[0] * old[1], -1).double().numpy()  # fmt: skip
    best = np.linalg.lstsq(basis, kernel.reshape(old[0] * old[1], -1).astype(float), rcond=None)[0]
    np.testing.assert_allclose(resized.reshape(best.shape), best, atol=2e-5)


def test_the_interpolations_differ():
    table = noise(1, 49, 6)
    assert REFERENCES.keys() == resizing.METHODS.keys()
    for new in ((4, 4), (9, 9)):
        tables = {method: surgery.resize(table, (7, 7), new, method) for method in REFERENCES}
        for a, b in itertools.combinations(REFERENCES, 2):
            same = {a, b} == {'bilinear', 'bilinear_antialias'} and new == (9, 9)
            assert (np.abs(tables[a] - tables[b]).max() < 1e-5) == same


@pytest.mark.parametrize('new', [(3, 6), (6, 3), (4, 2)])
def test_a_square_table_is_cropped(new):
    table, side = noise(1, 2 + 16, 6), max(new)
    whole = surgery.resize(table, (4, 4), (side, side), 'bicubic')[0, 2:].reshape(side, side, 6)
    part = surgery.resize(table, (4, 4), new, 'bicubic', square=True)
    np.testing.assert_array_equal(part[:, :2], table[:, :2])
    np.testing.assert_allclose(part[0, 2:].reshape(*new, 6), whole[: new[0], : new[1]], atol=1e-6)


@pytest.mark.parametrize('method', REFERENCES)
def test_equal_grids_change_nothing(method):
    table = noise(1, 17, 6)
    assert surgery.resize(table, (4, 4), (4, 4), method) is table
    assert surgery.resize(table, (4, 4), (2, 8), method) is not table  # though as many


def made(**fields):
    """(model, parameters of noise) for 28 x 28 pixels: 14 x 14 patches."""
    base = dict(width=12, depth=1, num_heads=2, mlp_dim=16, patch_size=2, num_classes=3)
    model = models.build('vit/2', **(base | fields))
    images = jnp.zeros((1, 28, 28, len(model.mean)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)


def flat(params):
    return {name: np.asarray(x) for name, x in flatten_dict(params, sep='/').items()}


TIMM = dict(gelu='exact', interpolation='bicubic_antialias')
TABLES = [  # (format, model, rows of the table, rows of tokens that are no patches)
    ('official', dict(), 197, 1),
    ('official', dict(pool='gap'), 196, 0),
    ('big_vision', dict(cls_posemb=False), 196, 0),
    ('big_vision', dict(pool='map'), 196, 0),
    ('timm', TIMM, 197, 1),
    ('timm', dict(TIMM, cls_posemb=False), 196, 0),
    ('timm', dict(TIMM, registers=4, registers_posemb=True), 201, 5),
    ('timm', dict(TIMM, registers=4, cls_posemb=False), 196, 0),
    ('timm', dict(TIMM, pool='gap', registers=4, registers_posemb=True), 200, 4),
    ('timm', dict(TIMM, pool='gap', registers=4), 196, 0),
    ('timm', dict(TIMM, dist_token=True, dist_head=True), 198, 2),
    ('hf', dict(gelu='exact', interpolation='bicubic'), 197, 1),
    ('hf', dict(gelu='exact', interpolation='bicubic', dist_token=True), 198, 2),
    ('hf', dict(TIMM, layer_scale=1.0, registers=4, num_classes=None), 197, 1),
]


@pytest.mark.parametrize('format, fields, rows, before, stated', [
    *((*row, False) for row in TABLES), *((*TABLES[i], True) for i in (0, 2, 6, 12)),
])
def test_tokens_are_never_taken_for_patches(format, fields, rows, before, stated, tmp_path):
    model, params = made(**fields)
    assert params['posemb'].shape[1] == rows
    path = tmp_path / ('out.npz' if format in ('official', 'big_vision') else 'out')
    vit_jax.save(path, model, params, format, image_size=28)
    source = path
    if not stated:  # by the arrays alone
        source = path / 'model.safetensors' if path.is_dir() else path
        for name in ('out.json', 'out/config.json', 'out/preprocessor_config.json'):
            (tmp_path / name).unlink(missing_ok=True)
    options = {} if stated else dict(num_heads=2)
    same = load.read(source, **options)
    assert same.image_size == (28, 28) and same.model.prefix_posemb == model.prefix_posemb
    larger = load.read(source, image_size=(40, 32), **options)
    old, new = params['posemb'], np.asarray(larger.params['posemb'])
    assert new.shape[1] == before + 20 * 16
    np.testing.assert_array_equal(new[:, :before], old[:, :before])
    grid = old[0, before:].reshape(14, 14, 12)
    expected = REFERENCES[larger.model.interpolation](grid, (20, 16)).reshape(320, 12)
    np.testing.assert_allclose(new[0, before:], expected, atol=2e-5)
    a, b = flat(same.params), flat(larger.params)
    assert all(a[n].tobytes() == b[n].tobytes() for n in a if n != 'posemb')


def nine_rows(tmp_path, prefix):
    """A timm file with 1 + 4 prefix tokens and a table of 9 rows: 3 x 3, or 5 and 2 x 2."""
    model, params = made(
        **TIMM, registers=4, cls_posemb=prefix, registers_posemb=prefix, num_classes=None
    )
    params = dict(params, posemb=noise(1, 9, 12))
    side = 4 if prefix else 6
    vit_jax.save(tmp_path / 'out', model, params, 'timm', image_size=side)
    (tmp_path / 'out' / 'config.json').unlink()
    return tmp_path / 'out' / 'model.safetensors', params, side


@pytest.mark.parametrize('prefix', [False, True])
def test_an_ambiguous_table_asks_for_the_size_and_takes_it(prefix, tmp_path):
    path, params, side = nine_rows(tmp_path, prefix)
    with pytest.raises(UserError) as e:
        load.read(path, num_heads=2)
    for words in ('pos_embed has 9 positions', '0 or 5 of them', "['cls', 'registers']",
                  'could be several', 'source_image_size=(height, width)'):  # fmt: skip
        assert words in str(e.value)
    read = load.read(path, num_heads=2, source_image_size=side)
    assert read.model.prefix_posemb == ({'cls': 1, 'registers': 4} if prefix else {})
    assert read.image_size == (side, side)
    np.testing.assert_array_equal(read.params['posemb'], params['posemb'])
    larger = load.read(path, num_heads=2, source_image_size=(side, side), image_size=8)
    before = 5 if prefix else 0
    assert larger.params['posemb'].shape == (1, before + 16, 12)
    np.testing.assert_array_equal(larger.params['posemb'][:, :before], params['posemb'][:, :before])
    with pytest.raises(UserError, match='source_image_size'):
        load.read(path, num_heads=2, source_image_size=10)  # 25 patches: neither


def test_a_table_that_is_no_square_is_resized_once_its_size_is_given(tmp_path):
    model, params = made()
    params = dict(params, posemb=noise(1, 1 + 15, 12))
    vit_jax.save(tmp_path / 'a.npz', model, params, image_size=(6, 10))
    (tmp_path / 'a.json').unlink()
    back = load.read(tmp_path / 'a.npz')
    np.testing.assert_array_equal(back.params['posemb'], params['posemb'])
    assert back.image_size is None
    with pytest.raises(UserError, match='16 positions, which are no square; .*source_image_size'):
        load.read(tmp_path / 'a.npz', image_size=16)
    read = load.read(tmp_path / 'a.npz', image_size=16, source_image_size=(6, 10))
    expected = zoomed(params['posemb'][0, 1:].reshape(3, 5, 12), (8, 8)).reshape(64, 12)
    np.testing.assert_allclose(read.params['posemb'][0, 1:], expected, atol=2e-5)


# Heads.


def rows(account, what):
    return {name: detail for done, name, detail in account if done == what}


def assert_equal_apart_from(a, b, *changed):
    """Parameters that are the same bit by bit, but for some (of either)."""
    a, b = flat(a), flat(b)
    names = {n for n in a.keys() | b.keys() if not n.startswith(changed)}
    assert len(names) > 10
    for name in names:
        assert a[name].tobytes() == b[name].tobytes(), name


def test_other_classes_get_a_head_of_zeros():
    whole = load.read(PRE_LOGITS)
    read = load.read(PRE_LOGITS, num_classes=7, image_size=64)
    assert read.model.num_classes == 7 and read.model.representation_size is None
    params = flat(read.params)
    assert params['head/kernel'].shape == (48, 7) and params['head/bias'].shape == (7,)
    assert not params['head/kernel'].any() and not params['head/bias'].any()
    assert not [name for name in params if name.startswith('pre_logits')]
    assert_equal_apart_from(whole.params, read.params, 'head', 'pre_logits', 'posemb')
    assert rows(read.account, 're-initialised') == {'head': 'zeros: 7 classes'}
    assert rows(read.account, 'unused') == {
        'head/bias': 'replaced by the new head', 'head/kernel': 'replaced by the new head',
        'pre_logits/bias': 'dropped with the head', 'pre_logits/kernel': 'dropped with the head',
    }  # fmt: skip
    table = 'Transformer/posembed_input/pos_embedding'
    assert rows(read.account, 'resized') == {table: '4 x 4 -> 8 x 8, linear'}
    loaded = rows(read.account, 'loaded')
    assert loaded['embedding/kernel'] == 'embedding/kernel' and loaded['cls'] == 'cls'
    in_file = set(np.load(PRE_LOGITS).files)
    assert loaded.keys() | rows(read.account, 'unused').keys() == in_file
    assert not loaded.keys() & rows(read.account, 'unused').keys()
    logits, out = read.model.apply({'params': read.params}, jnp.ones((1, 64, 64, 3)))
    assert logits.shape == (1, 7) and not logits.any() and out['pre_logits'].shape == (1, 48)
    account = [row for row in read.account if row[0] != 'guessed']
    lines = load.format_account(account).splitlines()
    assert [re.split(' {2,}', line) for line in lines] == [
        ['loaded', f'{len(loaded)} arrays', f'into {len(set(loaded.values()))} parameters'],
        ['resized', table, '4 x 4 -> 8 x 8, linear'],
        ['re-initialised', 'head', 'zeros: 7 classes'],
        ['unused', 'head/bias, head/kernel', 'replaced by the new head'],
        ['unused', 'pre_logits/bias, pre_logits/kernel', 'dropped with the head'],
    ]
    assert len({line.index(detail) for line, detail in (
        (lines[0], 'into'), (lines[1], '4 x 4'), (lines[2], 'zeros'), (lines[3], 'replaced'),
    )}) == 1  # in columns


def test_a_representation_layer_is_kept_where_that_is_asked_for():
    whole = load.read(PRE_LOGITS)
    read = load.read(PRE_LOGITS, num_classes=7, keep_pre_logits=True)
    assert read.model == whole.model.clone(num_classes=7)
    assert read.params['head']['kernel'].shape == (40, 7)
    assert_equal_apart_from(whole.params, read.params, 'head')
    assert rows(read.account, 'unused').keys() == {'head/bias', 'head/kernel'}


@pytest.mark.parametrize('keep', [False, True])
def test_no_classes_leave_no_head(keep):
    whole = load.read(PRE_LOGITS)
    read = load.read(PRE_LOGITS, num_classes=0, keep_pre_logits=keep)
    assert read.model.num_classes is None and 'head' not in read.params
    assert ('pre_logits' in read.params) == keep
    assert_equal_apart_from(whole.params, read.params, 'head', 'pre_logits')
    assert not rows(read.account, 're-initialised')
    images = jnp.asarray(np.load(DATA / 'official_vit_prelogits.expected.npz')['images'])
    features, out = read.model.apply({'params': read.params}, images)
    expected = whole.model.apply({'params': whole.params}, images)[1]
    expected = expected['pre_logits' if keep else 'cls']
    assert 'logits' not in out and features.shape == (1, 40 if keep else 48)
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_both_heads_of_a_distilled_model_are_new(tmp_path):
    model, params = made(**TIMM, dist_token=True, dist_head=True)
    vit_jax.save(tmp_path / 'out', model, params, 'timm', image_size=28, classes=['a', 'b', 'c'])
    read = load.read(tmp_path / 'out', num_classes=3)
    assert not read.params['head']['kernel'].any() and not read.params['dist_head']['bias'].any()
    assert rows(read.account, 're-initialised').keys() == {'head', 'dist_head'}
    assert rows(read.account, 'unused').keys() == {
        'head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'
    }
    assert read.classes is None  # what the new outputs stand for nobody knows
    none = load.read(tmp_path / 'out', num_classes=0)
    assert not none.model.dist_head and not {'head', 'dist_head'} & none.params.keys()


@pytest.mark.parametrize('value', [-1, 2.5, '7'])
def test_a_number_of_classes_that_is_none(value):
    with pytest.raises(UserError, match='num_classes is .*, not a number of classes'):
        load.read(PRE_LOGITS, num_classes=value)


# What does not fit.


def changed(tmp_path, **arrays):
    """The file of a fixture with other arrays; None takes one away. '/' is written as '__'."""
    values = dict(np.load(PRE_LOGITS)) | {n.replace('__', '/'): a for n, a in arrays.items()}
    np.savez(tmp_path / 'a.npz', **{n: a for n, a in values.items() if a is not None})
    return tmp_path / 'a.npz'


@pytest.mark.parametrize('arrays, words', [
    (dict(secret=noise(3, 4)), ['array secret [3, 4]', 'official model']),
    (dict(Transformer__encoderblock_1__MlpBlock_0__Dense_0__bias=None),
     ['no array Transformer/encoderblock_1/MlpBlock_0/Dense_0/bias [96]',
      'encoder/mlp/fc1/bias [96]']),
    (dict(Transformer__encoderblock_1__MlpBlock_0__Dense_0__bias=noise(95)),
     ['array Transformer/encoderblock_1/MlpBlock_0/Dense_0/bias is [95] in the file',
      'needs [96] for encoder/mlp/fc1/bias']),
    (dict(head__kernel=noise(48, 10)), ['array head/kernel is [48, 10]', 'needs [40, 10]']),
    (dict(Transformer__posembed_input__pos_embedding=noise(1, 17, 47)),
     ['pos_embedding is [1, 17, 47]', 'needs [1, 17, 48]']),
    (dict(cls=np.full((1, 1, 48), np.nan, np.float32)), ['array cls', 'not finite']),
    (dict(cls=np.ones((1, 1, 48), np.int64)), ['array cls', 'int64']),
])  # fmt: skip
def test_an_array_that_does_not_fit_is_named(arrays, words, tmp_path):
    path = changed(tmp_path, **arrays)
    with pytest.raises(UserError) as e:
        load.read(path)
    assert str(path) in str(e.value) and '\n' not in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_a_mixer_keeps_its_number_of_patches():
    path = DATA / 'official_mixer.npz'
    with pytest.raises(UserError, match='16 patches .* an image of 64 x 64 has 64'):
        load.read(path, image_size=64)
    whole, wide = load.read(path), load.read(path, image_size=(16, 64))
    assert (whole.image_size, wide.image_size) == ((32, 32), (16, 64))
    assert_equal_apart_from(whole.params, wide.params, 'nothing')


def test_an_image_size_that_patches_do_not_fill():
    with pytest.raises(UserError, match='60 x 64 is not divisible by the patch size 8 x 8'):
        load.read(PRE_LOGITS, image_size=(60, 64))
    with pytest.raises(UserError, match="image_size is '64', not a number of pixels"):
        load.read(PRE_LOGITS, image_size='64')


def test_fields_override_what_was_read():
    whole = load.read(PRE_LOGITS)
    read = load.read(PRE_LOGITS, epsilon=1e-3, gelu='exact', dtype='bfloat16', dropout=0.5)
    assert read.model == whole.model.clone(
        epsilon=1e-3, gelu='exact', dtype='bfloat16', dropout=0.5
    )
    assert_equal_apart_from(whole.params, read.params, 'nothing')
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(read.params))
    images = jnp.ones((1, 32, 32, 3))
    a, b = (r.model.apply({'params': r.params}, images)[0] for r in (whole, read))
    assert b.dtype == jnp.bfloat16 and not np.array_equal(a, b)
    fields = dict(epsilon=1e-3, gelu='quick', num_heads=6, interpolation='linear', mean=(0, 0, 0))
    whole = load.read(DATA / 'timm_vit_token')  # whose file tells all of these
    read = load.read(DATA / 'timm_vit_token', **fields)
    assert read.model == whole.model.clone(**fields) != whole.model
    with pytest.raises(UserError, match="no field 'epsilom'; the nearest is 'epsilon'"):
        load.read(PRE_LOGITS, epsilom=1e-3)


def test_a_table_before_each_block_begins_as_that_of_the_stem():
    stem, params = vit_jax.load(PRE_LOGITS, image_size=(48, 80))
    model, by_layer = vit_jax.load(PRE_LOGITS, image_size=(48, 80), posemb_at='layers')
    table = by_layer['encoder']['posemb']
    assert table.shape == (model.depth, *params['posemb'].shape) and 'posemb' not in by_layer
    images = np.random.default_rng(0).normal(size=(2, 48, 80, 3)).astype(np.float32)
    found, wanted = (
        m.apply({'params': p}, images)[0] for m, p in ((model, by_layer), (stem, params))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_heads_of_fused_weights_are_asked_for_where_nothing_tells_them(tmp_path):
    shutil.copy(DATA / 'timm_vit_token' / 'model.safetensors', tmp_path / 'a.safetensors')
    with pytest.raises(UserError, match=r'width 48 has; give num_heads='):
        load.read(tmp_path / 'a.safetensors')
    read = load.read(tmp_path / 'a.safetensors', num_heads=3)
    whole = load.read(DATA / 'timm_vit_token')
    assert read.model == whole.model
    assert_equal_apart_from(read.params, whole.params, 'nothing')
    with pytest.raises(UserError, match='48 is not divisible by model.num_heads 5'):
        load.read(tmp_path / 'a.safetensors', num_heads=5)


def test_a_timm_array_that_nothing_explains(tmp_path):
    arrays = load_file(DATA / 'timm_vit_token' / 'model.safetensors')
    save_file(arrays | {'blocks.0.attn.extra': noise(2)}, tmp_path / 'a.safetensors')
    with pytest.raises(UserError, match=re.escape('blocks.0.attn.extra [2]')):
        load.read(tmp_path / 'a.safetensors', num_heads=3)


# The weights of a run.


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The workdir of a run of 12 steps, with checkpoints of the steps 6 and 12."""
    folder = launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'val': 2})
    workdir = tmp_path_factory.mktemp('run') / 'run'
    in_process.run(folder, workdir, 'checkpoint.every=6')
    assert launched.checkpoints(workdir) == [6, 12]
    return workdir


def assert_is(params, arrays):
    params = flat(params)
    assert params.keys() == arrays.keys() and len(params) > 15
    for name, array in arrays.items():
        assert params[name].dtype == array.dtype, name
        assert params[name].tobytes() == array.tobytes(), name


def parameters(workdir, step, prefix='opt_state/.*average/'):
    """{name: array} of the parameters' moving average in a checkpoint, by Orbax alone."""
    state = launched.state(workdir, step)
    return {re.sub(f'^{prefix}', '', n): a for n, a in state.items() if re.match(prefix, n)}


def test_a_run_is_loaded(run):
    read = load.read(run)
    assert_is(read.params, parameters(run, 12))
    assert read.source == 'vit_jax' and read.image_size == (8, 8)
    assert read.classes == ('ant', 'bee', 'cat') and read.config['steps'] == 12
    assert (read.model.width, read.model.patch_size, read.model.drop_path) == (16, (4, 4), 0.1)
    for address in (run / 'checkpoints' / '12', run / 'checkpoints', f'{run}/'):
        assert_is(vit_jax.load(address)[1], parameters(run, 12))
    assert_is(vit_jax.load(run / 'checkpoints' / '6')[1], parameters(run, 6))
    with pytest.raises(UserError, match='no checkpoint 8, but 12, 6'):
        vit_jax.load(run / 'checkpoints' / '8')


def test_the_average_of_a_run_is_loaded_unless_asked_otherwise(run):
    for step in (6, 12):
        average, raw = parameters(run, step), parameters(run, step, 'params/')
        path = run / 'checkpoints' / str(step)
        for ema, wanted in (None, average), (True, average), (False, raw):
            assert_is(vit_jax.load(path, ema=ema)[1], wanted)
            assert_is(load.read(path, ema=ema).params, wanted)
        assert_is(vit_jax.load(path)[1], average)
        assert not np.array_equal(average['head/kernel'], raw['head/kernel'])
    with pytest.raises(UserError, match='not a checkpoint of a run, so it has no moving average'):
        vit_jax.load(PRE_LOGITS, ema=True)


def test_a_damaged_checkpoint_of_a_run_is_passed_over(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / 'run')
    newest = copy / 'checkpoints' / '12'
    for file in newest.rglob('d/*'):
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 0x10
        file.write_bytes(data)
    assert_is(vit_jax.load(copy)[1], parameters(run, 6))
    assert f'checkpoint {newest} is damaged: ' in capsys.readouterr().err
    with pytest.raises(UserError, match='checkpoints/12 is damaged'):
        vit_jax.load(newest)
    (copy / 'checkpoints' / '6' / 'state' / 'manifest.ocdbt').unlink()
    with pytest.raises(UserError, match='none of the 2 checkpoints in .* is intact'):
        vit_jax.load(copy)


def test_a_run_is_exported_and_loaded_back(run, tmp_path):
    read = load.read(run)
    vit_jax.save(
        tmp_path / 'a.npz', read.model, read.params, image_size=read.image_size,
        classes=read.classes, config=read.config,
    )  # fmt: skip
    back = load.read(tmp_path / 'a.npz')
    assert_is(back.params, parameters(run, 12))
    assert back.model == read.model.clone(dropout=0.0, drop_path=0.0)
    assert (back.classes, back.config) == (read.classes, read.config)
    images = noise(2, 8, 8, 3)
    a, b = (r.model.apply({'params': r.params}, images)[0] for r in (read, back))
    assert np.abs(a).max() > 0.01 and np.array_equal(a, b)


def test_a_run_is_fitted_to_other_classes_and_sizes(run):
    model, params = vit_jax.load(run, num_classes=7, image_size=16)
    arrays, params = parameters(run, 12), flat(params)
    assert model.num_classes == 7 and params['head/kernel'].shape == (16, 7)
    assert not params['head/kernel'].any() and not params['head/bias'].any()
    before, table = arrays['posemb'][:, :1], params['posemb']
    assert table.shape == (1, 1 + 16, 16)
    np.testing.assert_array_equal(table[:, :1], before)
    expected = zoomed(arrays['posemb'][0, 1:].reshape(2, 2, 16), (4, 4)).reshape(16, 16)
    np.testing.assert_allclose(table[0, 1:], expected, atol=1e-6)
    assert_equal_apart_from(params, arrays, 'head', 'posemb')
