"""Evaluation of a classifier against scikit-learn and by hand: subsets, several labels, bins."""

import csv

import jax
import numpy as np
import pytest
from learners import Table, classifier, subject
from PIL import Image
from sklearn import metrics

from vit_jax import models
from vit_jax.assembly import evaluations
from vit_jax.errors import UserError
from vit_jax.evaluators import classify, probe

CLASSES = Table().num_classes


def folder(path, labels, names):
    """Images whose first pixel is their number, one folder a class."""
    for i, label in enumerate(labels):
        place = path / names[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(place / f'{i:03}.png')
    return path


def evaluation(path, classes=None, **kwargs):
    model = Table()
    table = model.init(jax.random.key(0), np.zeros((1, 4, 4, 3), int))['params']['table']
    made = classify.Classify(
        subject(model, (4, 4, 3), classes), source=dict(name=str(path)), image_size=4,
        batch_size=16, **kwargs,
    )  # fmt: skip
    return made, {'table': table}, np.asarray(table, np.float64)


def names(count):
    return [f'n{i:02}' for i in range(count)]


def test_numbers_are_those_of_scikit_learn(tmp_path):
    labels = np.random.default_rng(0).integers(0, CLASSES, 200)
    path = folder(tmp_path, labels, names(CLASSES))
    made, params, table = evaluation(path)
    found = made(params)
    logits = table[:200]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    best = logits.argmax(1)
    assert found['examples'] == 200
    assert found['accuracy'] == pytest.approx(metrics.accuracy_score(labels, best))
    assert found['top5'] == pytest.approx(
        metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(CLASSES))
    )
    assert found['class_accuracy'] == pytest.approx(metrics.balanced_accuracy_score(labels, best))
    assert found.keys() - classify.METRICS.keys() == {'examples'}  # which is no score
    assert found['loss'] == pytest.approx(metrics.log_loss(labels, probs), rel=1e-5)
    confidence, hits, error = probs.max(1), best == labels, 0.0
    for k in range(classify.BINS):  # arXiv:1706.04599 eq. 3, in words
        inside = (confidence >= k / classify.BINS) & (confidence < (k + 1) / classify.BINS)
        if inside.any():
            error += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    assert found['ece'] == pytest.approx(error, rel=1e-4)
    seen = []
    assert made(params, advance=seen.append) == found
    assert len(seen) == 13 and sum(seen) == 200  # of each batch, padding not counted
    seen.clear()
    predicted = made.predictions(params, seen.append)
    assert len(seen) == 13 and sum(seen) == 200
    np.testing.assert_array_equal(
        classify.confusion(predicted['label'], predicted['prediction'], CLASSES),
        metrics.confusion_matrix(labels, best),
    )
    text = classify.by_class(predicted, names(CLASSES), CLASSES)
    head, *rows = csv.reader(text.splitlines())
    assert head == ['class', 'images', 'accuracy', *names(CLASSES)]
    assert [row[0] for row in rows] == names(CLASSES)
    assert [int(row[1]) for row in rows] == np.bincount(labels, minlength=CLASSES).tolist()
    recall = metrics.recall_score(labels, best, average=None)
    np.testing.assert_allclose([float(row[2]) for row in rows], recall)
    counts = [[int(n) for n in row[3:]] for row in rows]
    np.testing.assert_array_equal(counts, metrics.confusion_matrix(labels, best))


def test_classes_of_many_labels_and_of_none():
    found = dict(label=np.array([[1, 2], [0, -1], [-1, -1]]), prediction=np.array([2, 1, 0]))
    text = classify.by_class(found, ('a', 'b'), 3)
    assert text.splitlines() == [
        'class,images,accuracy,a,b,class 2', 'a,1,0.0,0,1,0', 'b,0,,0,0,0', 'class 2,1,1.0,0,0,1'
    ]
    many = classify.by_class(found, None, classify.MOST_CONFUSED + 1).splitlines()
    assert many[:2] == ['class,images,accuracy', 'class 0,1,0.0'] and many[3] == 'class 2,1,1.0'


def test_a_folder_of_some_classes_has_the_numbers_of_all(tmp_path):
    """Three folders, of classes 1, 4 and 6 of the model: only these are predicted."""
    labels, chosen = np.random.default_rng(1).integers(0, 3, 100), [1, 4, 6]
    path = folder(tmp_path, labels, [names(CLASSES)[c] for c in chosen])
    made, params, table = evaluation(path, tuple(names(CLASSES)))
    found = made(params)
    among = table[:100][:, chosen]
    assert found['accuracy'] == pytest.approx(np.mean(among.argmax(1) == labels))
    probs = np.exp(among) / np.exp(among).sum(1, keepdims=True)
    assert found['loss'] == pytest.approx(metrics.log_loss(labels, probs), rel=1e-5)
    assert set(made.predictions(params)['prediction']) == set(chosen)
    assert 'top5' not in found  # of three classes it is 1
    other, *_ = evaluation(path, None)  # nothing is known of the model's classes
    assert other(params)['accuracy'] == pytest.approx(np.mean(table[:100].argmax(1) == labels))


def test_calibration_is_that_of_the_probabilities_shown(tmp_path):
    """Of a sigmoid, which for the best class is not the probability of a softmax."""
    labels = np.sort(np.random.default_rng(2).integers(0, CLASSES, 60))  # as the folders are
    made, params, table = evaluation(folder(tmp_path, labels, names(CLASSES)), loss='sigmoid')
    probs = 1 / (1 + np.exp(-table[:60].max(axis=1)))
    np.testing.assert_allclose(made.predictions(params)['confidence'], probs, rtol=1e-5)
    hits, bins = table[:60].argmax(axis=1) == labels, (probs * classify.BINS).astype(int)
    gaps = [abs(hits[bins == b].sum() - probs[bins == b].sum()) for b in range(classify.BINS)]
    assert made(params)['ece'] == pytest.approx(np.sum(gaps) / 60, rel=1e-4)


def test_the_loss_is_that_of_training_unless_given(tmp_path):
    labels = np.sort(np.random.default_rng(3).integers(0, CLASSES, 20))
    path = folder(tmp_path, labels, names(CLASSES))
    _, params, table = evaluation(path)
    hot = np.eye(CLASSES)[labels]
    probs = 1 / (1 + np.exp(-table[:20]))
    sigmoid = -np.sum(hot * np.log(probs) + (1 - hot) * np.log1p(-probs), axis=1).mean()
    settings = dict(type='classify', source=dict(name=str(path)), image_size=4, batch_size=16)
    for given, value in ({}, sigmoid), ({'loss': None}, sigmoid), ({'loss': 'softmax'}, None):
        made = evaluations.make(
            subject(Table(), (4, 4, 3), loss='sigmoid'), {'loss': None} | settings | given
        )
        found = made(params)['loss']
        assert (found == pytest.approx(sigmoid, rel=1e-5)) == (value is not None)


def test_a_subset_with_the_numbers_of_all(tmp_path):
    """As TFDS has ImageNet-A: labels among all classes, of which some occur."""
    labels = np.random.default_rng(2).choice([0, 2, 5], 100)
    path = folder(tmp_path, labels, names(CLASSES))
    for name in names(CLASSES):
        (path / name).mkdir(exist_ok=True)
    (path / 'train').mkdir()
    made, params, table = evaluation(write_records(path, labels), subset=True)
    among = table[:100][:, [0, 2, 5]]
    wanted = np.searchsorted([0, 2, 5], labels)
    assert made(params)['accuracy'] == pytest.approx(np.mean(among.argmax(1) == wanted))
    plain, *_ = evaluation(path / 'records')
    assert plain(params)['accuracy'] == pytest.approx(np.mean(table[:100].argmax(1) == labels))


def write_records(path, labels, max_labels=1):
    """Records of the images in `path`, in the order of their numbers."""
    import json

    from vit_jax.data.readers import example, records

    out = path / 'records'
    out.mkdir()
    rows = []
    for i, label in enumerate(labels):
        data = next(path.glob(f'**/{i:03}.png')).read_bytes()
        rows.append(example.encode(data, list(np.atleast_1d(label)), f'{i}'))
    name = records.shard_name('train', 0, 1)
    _, size, digest = records.write_shard(out / name, iter(rows))
    shard = {'file': name, 'examples': len(rows), 'bytes': size, 'sha256': digest}
    (out / records.MANIFEST).write_text(json.dumps({
        'format': records.FORMAT, 'version': records.VERSION, 'max_labels': max_labels,
        'classes': names(CLASSES), 'splits': {'train': [shard]},
    }))  # fmt: skip
    return out


def test_an_image_with_several_labels_is_right_with_each_and_counts_nowhere_with_none(tmp_path):
    """As ImageNet ReaL is counted (arXiv:2006.07159 section 4)."""
    rng = np.random.default_rng(3)
    labels = [sorted(rng.choice(CLASSES, rng.integers(0, 4), replace=False)) for _ in range(60)]
    path = folder(tmp_path / 'images', np.zeros(60, int), names(1))
    made, params, table = evaluation(write_records(path, labels, max_labels=4))
    found, best = made(params), table[:60].argmax(1)
    counted = [i for i in range(60) if labels[i]]
    assert 0 < len(counted) < 60 and found['examples'] == len(counted)
    assert found['accuracy'] == pytest.approx(np.mean([best[i] in labels[i] for i in counted]))
    first = np.argsort(-table[:60], axis=1)[:, :5]
    assert found['top5'] == pytest.approx(np.mean([bool({*first[i]} & {*labels[i]})
                                                   for i in counted]))  # fmt: skip
    assert 'class_accuracy' not in found


def test_an_output_of_each_token_is_no_classifier_of_images(tmp_path):
    path = folder(tmp_path, [0, 1, 1], names(2))
    model = models.build('vit-mu/2', num_classes=2, pool='none')
    for make in (lambda: classifier(model, (4, 4, 3)), lambda: classify.Classify(
        subject(model, (4, 4, 3)), source=dict(name=str(path)), image_size=4, batch_size=8,
    )):  # fmt: skip
        with pytest.raises(UserError, match="model.pool is 'none'.*pool='cls'"):
            make()


def test_each_head_of_a_distilled_model_can_be_measured(tmp_path):
    model = models.build(
        'vit-ti/16', width=16, depth=1, num_heads=2, mlp_dim=8, patch_size=2, num_classes=3,
        dist_token=True, dist_head=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (90, 4, 4, 3), np.uint8)
    images = model.normalise(pixels)
    params = jax.jit(model.init)(jax.random.key(0), images)['params']
    params = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), params)
    out = model.apply({'params': params}, images)[1]
    for head, name in (('head', 'logits_cls'), ('dist_head', 'logits_dist')):
        params[head]['bias'] -= out[name].mean(0)  # so that each class is predicted
    out = model.apply({'params': params}, images)[1]
    best = {name: np.argmax(out[name], axis=1) for name in ('logits', 'logits_cls', 'logits_dist')}
    for i, label in enumerate(best['logits_dist']):
        place = tmp_path / names(3)[label]
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels[i]).save(place / f'{i:03}.png')
    made = dict(source=dict(name=str(tmp_path)), image_size=4, batch_size=32)
    of_model = subject(model, (4, 4, 3))
    for name, predicted in best.items():
        found = classify.Classify(of_model, output=name, **made)(params)
        assert found['accuracy'] == pytest.approx(np.mean(predicted == best['logits_dist']))
    assert np.mean(best['logits_cls'] == best['logits_dist']) < 0.9
    with pytest.raises(UserError, match="no output 'logits_dits'.*logits_dist"):
        classify.Classify(of_model, output='logits_dits', **made)


def test_a_probe_of_several_labels_is_a_mistake(tmp_path):
    path = folder(tmp_path / 'images', [0, 0, 0], names(1))
    source = dict(name=str(write_records(path, [[0, 1], [1], []], max_labels=2)))
    with pytest.raises(UserError, match='several labels per image'):
        probe.Probe(
            subject(None, (4, 4, 3)), source=source, train_source=source, image_size=4,
            batch_size=8, k=(1,),
        )  # fmt: skip


def test_no_label_at_all_is_a_mistake(tmp_path):
    path = folder(tmp_path / 'images', np.zeros(4, int), names(1))
    made, params, _ = evaluation(write_records(path, [[]] * 4, max_labels=2))
    with pytest.raises(UserError, match='no example of the data set has a label'):
        made(params)


def test_evaluations_with_a_slash_have_a_mean():
    found = classify.means({
        'c/fog_1': {'accuracy': 0.5}, 'c/fog_2': {'accuracy': 0.25}, 'real': {'accuracy': 0.9},
    })  # fmt: skip
    assert found == {'c/mean': {'accuracy': 0.375}}
