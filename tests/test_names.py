"""Labels are compared by the names of classes: whatever the order, the kind, the spelling."""

import json
import unicodedata

import jax
import kinds
import launched
import numpy as np
import pytest
from learners import Table, subject

from vit_jax import assembly, config, evaluate, train
from vit_jax.data import mixture, sources
from vit_jax.data.readers import names
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.evaluators import classify, probe
from vit_jax.run import workdir

WORDS = ('red', 'green', 'blue', 'n01', '7', 'a b', 'Öl')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('VIT_JAX_CACHE', str(tmp_path / 'cache'))


def accuracies(path, classes, *, outputs=None, **source):
    """(accuracy of a table of logits, the table) on a data set, by Classify."""
    model = Table(num_classes=outputs or len(classes))
    params = model.init(jax.random.key(0), np.zeros((1, 4, 4, 3), int))['params']
    made = classify.Classify(
        subject(model, (4, 4, 3), classes), source=dict(name=str(path), **source), image_size=4,
        batch_size=8,
    )  # fmt: skip
    return made(params)['accuracy'], np.asarray(params['table'])


@pytest.mark.parametrize('kind', kinds.KINDS)
def test_accuracy_is_that_by_name_for_any_order_and_subset(kind, tmp_path):
    rng = np.random.default_rng(kinds.KINDS.index(kind))
    for trial, count in enumerate((len(WORDS), len(WORDS), 3)):
        classes = tuple(str(w) for w in rng.permutation(WORDS))
        own = [str(w) for w in rng.permutation(WORDS)[:count]]
        labels = np.concatenate([np.arange(count), rng.integers(0, count, 40)])
        rows = [(kinds.png(i), int(k)) for i, k in enumerate(labels)]
        path = kinds.write(kind, tmp_path / str(trial), rows, own)
        found, table = accuracies(path, classes)
        among = sorted(classes.index(name) for name in own)
        best = [among[i] for i in table[: len(rows), among].argmax(1)]
        right = [classes[b] == own[k] for b, k in zip(best, labels, strict=True)]
        assert 0 < np.mean(right) < 1 and found == pytest.approx(np.mean(right)), (classes, own)


def test_folders_of_numbers_are_classes_of_these_numbers(tmp_path, capsys):
    """As ImageNet V2 comes; the model learnt from tars without names."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(12), rng.integers(0, 12, 60)])
    rows = [(kinds.png(i), int(k)) for i, k in enumerate(labels)]
    numbers = [str(k) for k in range(12)]
    folder = kinds.write('folder', tmp_path / 'all', rows, numbers)
    source = sources.load(name=str(folder))
    assert source.classes == tuple(numbers)
    said = capsys.readouterr().err
    assert 'numbers and sorted as such: label 2 is 2 (torchvision sorts text: 10)' in said
    for classes in (tuple(numbers), None, tuple(sorted(numbers))):
        found, table = accuracies(folder, classes, outputs=12)
        wanted = [(classes or numbers).index(str(k)) for k in labels]
        assert found == pytest.approx(np.mean(table[: len(rows)].argmax(1) == wanted))
    # Some of these folders are some of the classes, whether the model's have names or not.
    chosen = [3, 7, 10]
    some = [(kinds.png(i), int(k)) for i, k in enumerate(rng.integers(0, 3, 40))]
    folder = kinds.write('folder', tmp_path / 'some', some, [str(c) for c in chosen])
    for classes in (tuple(numbers), None):
        found, table = accuracies(folder, classes, outputs=12)
        best = table[: len(some), chosen].argmax(1)
        assert found == pytest.approx(np.mean(best == [k for _, k in some]))


@pytest.mark.parametrize('own, classes, wanted', [
    ('b c', 'a b c', [1, 2]),
    ('c a b', 'a b c', [2, 0, 1]),
    ('a b c', 'a b c', None),
    ('0 1', 'a b c', None),  # no names
    ('b a', '0 1', None),
    ('1 2', '0 1', None),  # as many
    ('2 1', '0 1 2', [2, 1]),
    ('00 01 02', '2 1 0', [2, 1, 0]),
    ('dog Cat', 'cat dog', [1, 0]),
    ('Cat cat', 'cat dog Cat', [2, 0]),  # the same name comes first
    ('b x', 'a b c', 'not those: x; of those, it lacks a, c'),
    ('a b c d', 'a b', 'not those: c, d'),
    ('CAT dog', 'cat dog Cat', 'not those: CAT'),  # which of both
    ('b a a', 'a b', "'a' occurs twice"),
    ('b a', 'a b b', "'b' occurs twice"),
    ('a b b', 'a b b', None),
    ('4 5', 'a b', 'not those: 4, 5'),
    ('4 5', '0 1 2', 'not those: 4, 5'),
    ('0 1 2', '0 10 2 1', [0, 3, 2]),
    ('0 1', '1 2', 'not those: 0'),
    ('0 1', '0 1 2', None),
    ('+1 -9 -10', '-10 -9 1', [2, 1, 0]),
    ('b a', '0 1 2', None),
])  # fmt: skip
def test_places(own, classes, wanted):
    def places():
        return names.label_table(own.split(), classes.split(), 'it', 'those:'[:-1])

    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted) as e:
            places()
        assert 'source.labels=by_number' in str(e.value) and '\n' not in str(e.value)
    else:
        found = places()
        assert (found if found is None else found.tolist()) == wanted


@pytest.mark.parametrize('given, wanted', [
    (('a', 'b'), ('a', 'b')), (('a', 'b', 'a'), ('a (0)', 'b', 'a (2)')), ((), ()),
    (('a (1)', 'a', 'a', 'a (1)'), ('a (1) (0)', 'a (1)', 'a (2)', 'a (1) (3)')),
])  # fmt: skip
def test_names_that_two_classes_have_get_their_numbers(given, wanted):
    assert names.distinct(given) == wanted and len(set(wanted)) == len(given)


def test_folders_of_numbers_with_signs_are_in_their_order(tmp_path):
    rows = [(kinds.png(i), i % 4) for i in range(8)]
    folder = kinds.write('folder', tmp_path / 'all', rows, ['-9', '+1', '0', '-10'])
    assert sources.load(name=str(folder)).classes == ('-10', '-9', '0', '+1')


def test_a_mark_of_utf_8_is_no_part_of_the_first_name(tmp_path):
    rows = [(kinds.png(i), i % 2) for i in range(4)]
    path = kinds.write('tar', tmp_path / 'a', rows, ('ant', 'bee'))
    file = path / 'train' / 'classes.json'
    for name, text in ('classes.json', '["ant", "bee"]'), ('classes.txt', 'ant\r\nbee\r\n'):
        file.unlink()
        file = file.with_name(name)
        file.write_text(text, encoding='utf-8-sig')
        assert sources.load(name=str(path)).classes == ('ant', 'bee')


def test_fewer_names_than_classes_without_any_are_said(capsys):
    assert names.label_table(['b', 'a'], ['0', '1', '2'], 'data set one', 'those') is None
    assert 'compared by number, though it has 2 classes of 3' in capsys.readouterr().err


def test_names_are_the_same_however_a_file_system_composes_them(capsys):
    found = names.label_table(
        [unicodedata.normalize('NFD', w) for w in ('Öl', 'Ähre')], ['Ähre', 'Öl ', 'x'], 'd', 'm'
    )
    assert found.tolist() == [1, 0]
    assert '3 classes, 2 of them, in another order, label 0' in capsys.readouterr().err


def test_parts_of_a_mixture_are_put_together_by_name(tmp_path):
    rows = [(kinds.png(i), i % 3) for i in range(6)]
    kinds.write('parquet', tmp_path / 'a', rows, ('ant', 'bee', 'cat'))
    kinds.write('tar', tmp_path / 'b', rows, ('Cat', 'ant', 'bee'))
    kinds.write('tar', tmp_path / 'bare', rows, ('0', '1', '2'))
    kinds.write('arrow', tmp_path / 'twice', rows, ('ant', 'bee', 'ant'))

    def mixed(*keys, **labels):
        return mixture.load(mixture={
            k: dict(name=str(tmp_path / k), weight=1.0, labels=labels.get(k, 'by_name'))
            for k in keys
        })  # fmt: skip

    source = mixed('a', 'b')
    assert source.classes == ('ant', 'bee', 'cat')
    labels = [int(source.records[i]['label']) for i in range(12)]
    assert labels == [0, 1, 2, 0, 1, 2, 2, 0, 1, 2, 0, 1]
    with pytest.raises(UserError, match='bare of the mixture has no names.*labels=by_number'):
        mixed('a', 'bare')
    source = mixed('a', 'bare', bare='by_number')
    assert source.classes == ('ant', 'bee', 'cat')
    assert [int(source.records[i]['label']) for i in range(6, 12)] == [0, 1, 2, 0, 1, 2]
    with pytest.raises(UserError, match="twice of the mixture has a class 'ant' twice"):
        mixed('a', 'twice')
    # As one data set it is mapped to a model's classes, and keeps its parts' weights.
    mapped = names.relabel(mixed('a', 'b'), ('cat', 'bee', 'ant'), 'it')
    assert [int(mapped.records[i]['label']) for i in (0, 1, 2, 6)] == [2, 1, 0, 0]
    assert [part.weight for part in mapped.records.parts] == [1.0, 1.0]


def test_a_probe_compares_names(tmp_path):
    rows = [(kinds.png(20 * i), i % 3) for i in range(12)]
    turned = [(data, (k + 1) % 3) for data, k in rows]
    train_ = kinds.write('parquet', tmp_path / 'a', rows, ('ant', 'bee', 'cat'))
    test = kinds.write('parquet', tmp_path / 'b', turned, ('cat', 'ant', 'bee'))

    def made(**source):
        return probe.Probe(
            subject(None, (4, 4, 3)), source=dict(name=str(test), **source),
            train_source=dict(name=str(train_)), image_size=4, batch_size=8, k=(1,),
        )  # fmt: skip

    assert [made().source.records[i]['label'] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    by_number = made(labels='by_number').source.records
    assert [by_number[i]['label'] for i in range(3)] == [1, 2, 0]
    kinds.write('parquet', tmp_path / 'c', rows, ('ant', 'bee', 'dog'))
    test = tmp_path / 'c'
    with pytest.raises(UserError, match="not train_source's: dog"):
        made()


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """(workdir of a run that tells three classes, its images)."""
    where = tmp_path_factory.mktemp('pretrained')
    folder = launched.write_images(where / 'images', {'train': 16, 'val': 10})
    return run(f'{launched.TINY}:{folder}', where / 'run', 'steps=60'), folder


def run(file, path, *overrides):
    pairs = [('evals.val.batch_size', '8'), *(o.split('=', 1) for o in overrides)]
    with workdir.lock_workdir(str(path)) as path:
        begun = workdir.read_json(path / 'config.json')
        assert train.train(config.load(file, pairs, begun), path, Stop())['steps']
    return path


def shuffled(folder, path, split, own, kind='parquet'):
    """The images of a folder as another kind, whose classes are numbered in the order of `own`."""
    rows = [
        (file.read_bytes(), own.index(name)) for name in own
        for file in sorted((folder / split / name).iterdir())
    ]  # fmt: skip
    return kinds.write(kind, path, rows, own, split)


@pytest.mark.slow
def test_a_checkpoint_and_a_kept_head_see_the_classes_of_their_names(pretrained, tmp_path):
    checkpoint, folder = pretrained
    own = ['cat', 'ant', 'bee']
    for split in ('train', 'val'):
        other = shuffled(folder, tmp_path / 'other', split, own)
    file = checkpoint / 'config.json'

    def on(name, labels='by_name'):
        pairs = [('evals.val.source.name', str(name)), ('evals.val.source.labels', labels)]
        return next(evaluate.evaluate(checkpoint, config.load(str(file), pairs)))[1]['accuracy']

    wanted = on(folder)
    assert wanted > 0.6 and on(other) == wanted and on(other, 'by_number') < 0.5
    renamed = shuffled(folder, tmp_path / 'renamed', 'val', own)
    pairs = [('init_from', str(checkpoint)), ('keep_head', 'true'), ('steps', '1')]
    pairs += [('optim.lr', '1e-30'), ('optim.warmup', '0'), ('data.source.name', str(other))]
    overrides = [f'{key}={value}' for key, value in pairs]
    kept = run(str(file), tmp_path / 'kept', *overrides, f'evals.val.source.name={renamed}')
    assert json.loads((kept / 'classes.json').read_text()) == ['ant', 'bee', 'cat']
    metrics = json.loads((kept / 'result.json').read_text())['metrics']
    assert metrics['val/accuracy'] == pytest.approx(wanted) and metrics['accuracy'] > 0.6
    assert next(evaluate.evaluate(kept, config.load(str(file))))[1]['accuracy'] == wanted
    begun = workdir.read_json(kept / 'config.json')
    checkpoint.rename(checkpoint.with_name('gone'))  # what it began from
    settings = config.load(str(kept / 'config.json'), begun=begun)
    assert assembly.kept_classes(settings, kept, begun=True) == ['ant', 'bee', 'cat']
    checkpoint.with_name('gone').rename(checkpoint)
    # A new head has the data's own order, and evaluations follow it.
    new = run(str(file), tmp_path / 'new', f'data.source.name={other}', 'steps=60')
    assert json.loads((new / 'classes.json').read_text()) == own
    metrics = json.loads((new / 'result.json').read_text())['metrics']
    assert metrics['val/accuracy'] > 0.6
