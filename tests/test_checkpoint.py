"""Checkpoints: what is restored is what was saved, or it is refused and named."""

import asyncio
import collections
import concurrent.futures
import functools
import shutil
import sys
import threading
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learners import classifier

from vit_jax import models, optim, sharding, step
from vit_jax.errors import UserError
from vit_jax.io import retries
from vit_jax.run import checkpoint, fingerprints, orbax_errors
from vit_jax.run.checkpoint import Checkpoints

IMAGE = (8, 8, 3)
MODEL = models.build(
    'vit-ti/4', num_classes=4, width=16, depth=2, num_heads=2, mlp_dim=32
)


@functools.cache
def parts(devices=8, **mesh):
    mesh = sharding.make_mesh(jax.devices()[:devices], **mesh)
    params = step.abstract_params(classifier(MODEL, IMAGE))
    tx = optim.make(params, 10, momentum_dtype='bfloat16', ema=0.9)
    return tx, step.abstract_state(classifier(MODEL, IMAGE), tx, mesh)


def state_at(n, **mesh):
    """A state of the step n whose arrays are noise of the seed n."""
    rng = np.random.default_rng(n)

    def noise(path, x):
        value = n if path[0].name == 'step' else 100 * rng.normal(size=x.shape)
        return jax.device_put(np.asarray(value, x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(noise, parts(**mesh)[1])


def assert_same_bits(a, b):
    a, b = jax.device_get(a), jax.device_get(b)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.tobytes(), y.tobytes()), a, b)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A workdir with checkpoints of the steps 10 and 20."""
    workdir = tmp_path_factory.mktemp('saved')
    with Checkpoints(workdir) as checkpoints:
        for n in (10, 20):
            checkpoints.save(n, state_at(n), {})
    return workdir


def resume(workdir, **mesh):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.resume(parts(**mesh)[1])


@pytest.mark.parametrize('mesh', [dict(), dict(fsdp=8), dict(fsdp=2, tensor=2)])
def test_any_mesh_restores_the_same_bits(saved, mesh):
    state = resume(saved, **mesh)
    assert_same_bits(state, state_at(20))
    wanted = jax.tree.map(lambda x: x.sharding, parts(**mesh)[1])
    assert jax.tree.map(lambda x: x.sharding, state) == wanted


def test_a_new_workdir_has_nothing_to_resume(tmp_path):
    assert resume(tmp_path) is None


def damages(data):
    """Ways in which a file goes bad."""
    middle = len(data) // 2
    yield 'cut', data[:middle]
    yield 'empty', b''
    yield 'zeros', data[:middle] + bytes(len(data) - middle)
    for name, place in dict(first=0, middle=middle, last=len(data) - 1).items():
        if data:
            flipped = bytearray(data)
            flipped[place] ^= 0x10
            yield f'bit flipped in the {name} byte', bytes(flipped)
    yield 'gone', None


# TensorStore's threads come back to event loops that Orbax has closed after the error.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.slow
def test_whatever_is_damaged_the_newest_sound_one_is_resumed(saved, tmp_path, capsys):
    files = [p.relative_to(saved) for p in (saved / 'checkpoints' / '20').rglob('*') if p.is_file()]
    sound = {n: state_at(n, devices=1) for n in (10, 20)}
    noticed = collections.Counter()
    for i, file in enumerate(sorted(files)):
        for kind, data in damages((saved / file).read_bytes()):
            workdir = shutil.copytree(saved, tmp_path / f'{i}{kind}')
            (workdir / file).unlink() if data is None else (workdir / file).write_bytes(data)
            capsys.readouterr()
            state = resume(workdir, devices=1)
            n = int(state.step)  # Orbax writes some things twice, so 20 can still be sound
            assert_same_bits(state, sound[n])
            if n == 10:
                said = capsys.readouterr().err
                assert f'checkpoint {workdir}/checkpoints/20 is damaged: ' in said
                noticed[kind] += 1
    assert len(files) > 8 and min(noticed.values()) >= 3 and len(noticed) == 7, noticed


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_flipped_bit_that_orbax_does_not_notice(tmp_path, capsys):
    sound = {n: state_at(n, devices=1) for n in (10, 20)}
    with Checkpoints(tmp_path / 'saved') as checkpoints:
        for n, state in sound.items():
            checkpoints.save(n, state, {})
    newest = tmp_path / 'saved' / 'checkpoints' / '20'
    files = [p for p in newest.rglob('d/*') if p.stat().st_size > 2000]
    for i, file in enumerate(files):
        data = bytearray(file.read_bytes())
        for place in (len(data) // 8, len(data) // 3):  # arrays, as Orbax lays them out
            flipped = data.copy()
            flipped[place] ^= 0x10
            workdir = shutil.copytree(tmp_path / 'saved', tmp_path / f'{i}-{place}')
            (workdir / file.relative_to(tmp_path / 'saved')).write_bytes(flipped)
            state = resume(workdir, devices=1)
            assert_same_bits(state, sound[int(state.step)])
    assert 'are not those that were saved' in capsys.readouterr().err


def test_the_newest_one_is_read_while_a_run_saves_and_deletes(tmp_path):
    def run():
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            for n in range(1, 1000):
                checkpoints.save(n, state_at(n, devices=1), {})
                if over.is_set():
                    break

    over = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            while not any((tmp_path / 'checkpoints').glob('[0-9]')):
                assert not running.done()
            found = [checkpoint.restore_newest(tmp_path, parts(1)[1])]
            while found[-1].step < 7:
                found.append(checkpoint.restore_newest(tmp_path, parts(1)[1]))
        finally:
            over.set()
        running.result()
    steps = [int(state.step) for state in found]
    assert steps == sorted(steps)
    for state in found:
        assert_same_bits(state, state_at(int(state.step), devices=1))


def test_a_step_whose_checkpoint_was_damaged_is_saved_again(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / 'run')
    for _ in range(2):  # also when it is damaged once more
        (workdir / 'checkpoints' / '20' / 'state' / 'manifest.ocdbt').unlink()
        assert int(resume(workdir).step) == 10
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(20, state_at(20), {})
        assert_same_bits(resume(workdir), state_at(20))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / 'run')
    for file in (workdir / 'checkpoints').rglob('d/*'):
        file.write_bytes(b'')
    with pytest.raises(UserError, match='none of the 2 checkpoints in .* is sound'):
        resume(workdir)


def test_a_checkpoint_of_another_model_is_named(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / 'run')
    other = MODEL.clone(width=8)
    params = step.abstract_params(classifier(other, IMAGE))
    tx = optim.make(params, 10, momentum_dtype='bfloat16', ema=0.9)
    abstract = step.abstract_state(classifier(other, IMAGE), tx, sharding.make_mesh())
    with Checkpoints(workdir) as checkpoints, pytest.raises(UserError, match='does not fit') as e:
        checkpoints.resume(abstract)
    assert '16' in str(e.value) and '8' in str(e.value)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8'])
def test_the_fingerprint_changes_with_any_bit_and_any_swap(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 100, (3, 5)), dtype)
    reference = int(fingerprints.fingerprint(x))
    words = np.asarray(x).view(f'uint{8 * x.dtype.itemsize}').copy()
    for i in range(words.size):
        for bit in range(8 * x.dtype.itemsize):
            changed = words.copy()
            changed.flat[i] ^= words.dtype.type(1 << bit)
            assert int(fingerprints.fingerprint(jnp.asarray(changed.view(x.dtype)))) != reference
    swapped = words[::-1].copy().view(x.dtype)
    assert int(fingerprints.fingerprint(jnp.asarray(swapped))) != reference


@pytest.mark.parametrize('fields, scores, kept', [
    (dict(keep=2), {}, {40, 50}),
    (dict(keep=1, keep_every=20), {}, {20, 40, 50}),
    (dict(keep=1, best='test/accuracy'), {10: 0.3, 30: 0.9, 40: 0.1}, {30, 50}),
    (dict(keep=1, best='test/loss', mode='min'), {10: 0.3, 30: 0.9, 40: 0.1}, {40, 50}),
    (dict(keep=1, best='test/accuracy'), {35: 1.0, 20: 0.5}, {20, 50}),
])
def test_what_is_kept(tmp_path, fields, scores, kept):
    with Checkpoints(tmp_path, **fields) as checkpoints:
        for n in range(10, 60, 10):
            known = {k: v for k, v in scores.items() if k <= n}
            checkpoints.save(n, {'x': jnp.arange(3) + n}, known)
            checkpoints.wait()
    for save in (False, True):  # a run that is opened again knows nothing of scores at first
        with Checkpoints(tmp_path, **fields) as checkpoints:
            if save:
                checkpoints.save(50, {'x': jnp.arange(3) + 50}, scores)
        assert {int(p.name) for p in (tmp_path / 'checkpoints').iterdir()} == kept


def test_the_last_one_stays_until_the_next_is_complete(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {'x': jnp.arange(3)}, {})
        checkpoints.wait()
        checkpoints.save(2, {'x': jnp.arange(3)}, {})
        assert (tmp_path / 'checkpoints' / '1' / 'state').exists()
    assert {int(p.name) for p in (tmp_path / 'checkpoints').iterdir()} == {2}


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    double = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        x = jnp.arange(1_000_000.0)
        checkpoints.save(1, {'x': x}, {})
        for _ in range(5):
            x = double(x)
        checkpoints.wait()
        target = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        restored = checkpoints.restore(1, {'x': target})
    np.testing.assert_array_equal(restored['x'], np.arange(1_000_000.0, dtype=np.float32))


def test_what_a_failed_save_leaves_behind_is_not_said(monkeypatch):
    async def never_awaited():
        pass

    with warnings.catch_warnings(record=True) as said:
        monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
        orbax_errors.silence_repeats()
        never_awaited()
    assert not said
    told, loop = [], object.__new__(asyncio.SelectorEventLoop)  # it got no file descriptor
    try:
        loop.__del__()
    except AttributeError as e:
        which = dict(exc_type=type(e), exc_value=e, exc_traceback=e.__traceback__)
        for owner in (asyncio.BaseEventLoop.__del__, never_awaited):
            unraisable = types.SimpleNamespace(**which, object=owner)
            orbax_errors.drop_repeats(unraisable, told.append)
            assert len(told) == (owner is never_awaited)
    assert told


def test_an_orbax_without_the_private_names_is_named_with_its_version(monkeypatch):
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for name in retries.CONTEXTS:
        monkeypatch.setattr(tensorstore_utils, name, {})
    retries.limit_retries(3)
    for name in retries.CONTEXTS:
        assert getattr(tensorstore_utils, name)['gcs_request_retries']['max_retries'] == 3
    monkeypatch.delattr(tensorstore_utils, retries.CONTEXTS[0])
    with pytest.raises(UserError, match=rf'{retries.CONTEXTS[0]}.*pip install "orbax-checkpoint'):
        retries.limit_retries(3)
