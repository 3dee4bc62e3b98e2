"""Which splits a data set has, what a split's text means, what recipes make of both."""

import re
import shutil

import kinds
import numpy as np
import pytest

from vit_jax import config
from vit_jax.data import mixture, sources
from vit_jax.data.readers import splits
from vit_jax.errors import UserError

NAMES = ('ant', 'bee')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))


def rows(count):
    return [(kinds.png(i), i % 2) for i in range(count)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('folder')
    kinds.write_folder(path, rows(40), NAMES, '.')
    return path


def test_every_text_is_a_split_of_the_form_or_an_error(folder):
    whole = set(sources.load(name=str(folder)).records.paths)
    rng = np.random.default_rng(0)
    texts = [''.join(rng.choice([*'[]:%.+- 0159e', 'train', 'val'], rng.integers(1, 9)))
             for _ in range(1500)]  # fmt: skip
    texts += [f'train{rest}' for rest in (
        '[', ']', '[]', '[:', '[:]', '[:50%', ':50%]', '[:50%]]', '[[:50%]', '[10%:5%]',
        '[:200%]', '[50%:50%]', '[-5%:]', '[:500]', '[5:]', '[1e1%:]', '[nan%:]', '[inf%:]',
        '[:50%][50%:]', ' ',
        '[ :50%]', '[:50 %]', '[:50%:]', '[50%]', '[%:]', '[:%]', '[:1_0%]', '[:\u0665%]', '\n',
        '[:50%]\n', '[0%:100%]', '[.5%:]', '[:0%]', '[100%:]', '[99.5%:]',
    )]  # fmt: skip
    good = 0
    for text in texts:
        form = re.fullmatch(r'train(\[(?:(\d+(?:\.\d+)?)%)?:(?:(\d+(?:\.\d+)?)%)?\])?', text, re.A)
        low, high = (float(form[2] or 0), float(form[3] or 100)) if form else (1, 0)
        try:
            found = set(sources.load(name=str(folder), split=text).records.paths)
        except UserError as e:
            sound = low < high <= 100 and len(form[2] or '') < 4 and len(form[3] or '') < 4
            assert not sound, (text, e)
        else:
            assert low < high <= 100 and found <= whole, text
            assert (found == whole) == (low == 0 and high == 100), text
            good += 1
    assert good >= 4
    with pytest.raises(UserError, match='only TFDS data sets take counts of examples'):
        sources.load(name=str(folder), split='train[:500]')


@pytest.mark.parametrize('val', ['val', 'valid', 'validation', 'dev', 'test'])
@pytest.mark.parametrize('kind', kinds.KINDS)
def test_recipes_use_the_splits_that_a_data_set_has(kind, val, tmp_path, monkeypatch):
    path = tmp_path / 'x'
    kinds.write(kind, path, rows(16), NAMES)
    monkeypatch.setenv('HOME', str(tmp_path))  # the shell does not expand ~ in FILE:~/x
    for files in ('experiments/folder.py', 'experiments/finetune.py'):
        train, held_out = sizes(config.load(f'{files}:~/x', [('model.name', 'vit-ti/16')]))
        assert train + held_out['val'] == 16 and 0 < held_out['val'] < 6
    kinds.write(kind, path, rows(6), NAMES, val)
    assert set(sources.splits_of('~/x')) == {'train', val}
    for files in ('experiments/folder.py', 'experiments/finetune.py'):
        settings = config.load(f'{files}:~/x', [('model.name', 'vit-ti/16')])
        assert sizes(settings) == (16, {'test' if val == 'test' else 'val': 6})
    for wrong in {'val', 'validation', 'holdout'} - {val}:
        with pytest.raises(UserError, match=f"no split '{wrong}'; it has .*{val}.*source.split"):
            sources.load(name=str(path), split=wrong)


def sizes(settings):
    """(training examples, {evaluation: examples})."""
    evals = {name: len(mixture.load(**e.source)) for name, e in settings.evals.items()}
    return len(mixture.load(**settings.data.source)), evals


@pytest.mark.parametrize('split, length', [
    ('train', 50), ('train[:90%]', 45), ('train[98%:]', 1), ('train[:5]', 5), ('train[:65]', 50),
    ('train[10:]', 40), ('train[10:25]', 15), ('train[60:]', 0),
])  # fmt: skip
def test_the_size_of_a_split_without_the_data(split, length):
    assert splits.size(split, 50) == ('train', length)
    with pytest.raises(UserError):
        splits.size('train[5:10%]', 50)


def test_a_validation_and_a_test_set_are_both_used():
    assert splits.held_out(('train', 'test', 'validation')) == (
        'train', {'val': 'validation', 'test': 'test'})
    assert splits.held_out(('train',)) == ('train[:90%]', {'val': 'train[90%:]'})
    assert sources.held_out('jft_like:50x10') == ('train', {'test': 'test'})


def test_a_folder_divided_under_other_names_is_no_data_set_of_two_classes(tmp_path):
    kinds.write('folder', tmp_path, rows(8), NAMES, 'Train')
    kinds.write('folder', tmp_path, rows(8), NAMES, 'Val')
    with pytest.raises(UserError, match='folders Train, Val, which are splits by their names'):
        sources.load(name=str(tmp_path))
    (tmp_path / 'Train').rename(tmp_path / 'train')
    assert sources.splits_of(str(tmp_path)) == ('Val', 'train')
    shutil.rmtree(tmp_path / 'Val')
    # A class may be called train.
    kinds.write('folder', tmp_path / 'vehicles', rows(8), ('bus', 'train'), '.')
    assert sources.load(name=str(tmp_path / 'vehicles')).classes == ('bus', 'train')


def test_a_share_by_hash_has_images_of_every_class_on_both_sides(tmp_path):
    rng = np.random.default_rng(0)
    counts = [2, 3, 4, 5, 8, 12, 30]
    labels = np.repeat(range(len(counts)), counts)
    order = [(kinds.png(i), int(k)) for i, k in enumerate(rng.permutation(labels))]
    path = kinds.write('folder', tmp_path, order, [f'c{k}' for k in range(len(counts))], '.')

    def of(split):
        return sources.load(name=str(path), split=split).records

    bounds = ('[:90%]', '[90%:]'), ('[:50%]', '[50%:]'), ('[:1%]', '[1%:60%]', '[60%:]')
    for parts in bounds:
        found = [of(f'train{part}') for part in parts]
        paths = [p for one in found for p in one.paths]
        assert sorted(paths) == sorted(of('train').paths)  # each image is on one side
        for one in (found[0], found[-1]):
            assert set(one.labels) == set(range(len(counts))), parts
    # Files that come later leave the others of a well-filled class where they are.
    before = {p for p in of('train[90%:]').paths if '/c6/' in p}
    for i in range(40):
        (path / 'c6' / f'new{i}.png').write_bytes(kinds.png(i))
    after = {p for p in of('train[90%:]').paths if '/c6/' in p}
    assert before <= after and all('new' in p for p in after - before)
