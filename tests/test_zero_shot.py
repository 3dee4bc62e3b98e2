"""Zero-shot classification: prompts, class embeddings and accuracy against NumPy."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from vit_jax import evaluators, sharding
from vit_jax.data import prompts
from vit_jax.errors import UserError
from vit_jax.evaluators import zero_shot

LENGTH, WIDTH, WORDS = 24, 8, 128


class Letters:
    """A tokenizer of a token for each ASCII character."""

    vocab_size, length = WORDS, LENGTH

    def __call__(self, texts):
        rows = [[ord(c) for c in text[:LENGTH]] for text in texts]
        return np.array([row + [0] * (LENGTH - len(row)) for row in rows], np.int32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def subject(mesh):
    """A model whose embeddings are rows of a table, by a pixel and by the tokens of a text."""

    def predict(params, batch):
        out = {}
        if 'image' in batch:
            x = params['image'][batch['image'][:, 0, 0, 0].astype(int)]
            out['image_embedding'] = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        if 'text' in batch:
            x = params['text'][batch['text']].sum(axis=1)
            out['text_embedding'] = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        return out | {'temperature': jnp.full(len(next(iter(out.values()))), 5.0)}

    outputs = {n: jax.ShapeDtypeStruct((1, WIDTH), np.float32)
               for n in ('image_embedding', 'text_embedding')}  # fmt: skip
    return evaluators.Subject(predict, mesh, outputs, {}, {}, Letters())


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {'image': rng.standard_normal((256, WIDTH)).astype(np.float32),
            'text': rng.standard_normal((WORDS, WIDTH)).astype(np.float32)}  # fmt: skip


def folder(path, values, labels, names):
    """Images of one value each, in a folder a class."""
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        (path / names[label]).mkdir(exist_ok=True, parents=True)
        pixels = np.full((8, 8, 3), value, np.uint8)
        PIL.Image.fromarray(pixels).save(path / names[label] / f'{i:03}.png')
    return dict(name=str(path))


def test_accuracy_is_that_of_numpy_on_any_devices(tmp_path):
    rng, classes = np.random.default_rng(1), ('ankle_boot', 'bag', 'hat')
    values, labels = rng.integers(0, 256, 37), rng.integers(0, 3, 37)
    source = folder(tmp_path, values, labels, classes)
    templates = ('a {}', 'one {} here', '{}')
    for axes in (dict(data=1), dict(data=4, fsdp=2)):
        mesh = sharding.make_mesh(jax.devices()[: int(np.prod(list(axes.values())))], **axes)
        evaluate = zero_shot.ZeroShot(
            subject(mesh), source=source, image_size=8, batch_size=16, templates=templates
        )
        found = evaluate(params())
        p = {name: np.asarray(x, np.float64) for name, x in params().items()}
        names = [name.replace('_', ' ') for name in classes]
        texts = Letters()([t.replace('{}', name) for name in names for t in templates])
        weights = unit(p['text'][texts].sum(axis=1)).reshape(len(classes), len(templates), WIDTH)
        logits = 5 * unit(p['image'][values]) @ unit(weights.mean(axis=1)).T
        assert np.isclose(found['accuracy'], np.mean(logits.argmax(axis=1) == labels))
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        loss = -np.mean(np.log(probabilities[np.arange(len(labels)), labels]))
        assert np.isclose(found['loss'], loss, rtol=1e-5)
        assert found['examples'] == len(labels)


def test_labels_and_templates(tmp_path):
    classes = ('ankle_boot', 'bag')
    assert prompts.labels_of(None, classes) == ('ankle boot', 'bag')
    (tmp_path / 'labels.txt').write_text('\ufeffa <b>boot</b>\r\n{bag} &amp;\u2028co\n\n\n')
    read = prompts.labels_of(str(tmp_path / 'labels.txt'), classes)
    assert read == ('a <b>boot</b>', '{bag} &amp;\u2028co')
    texts = prompts.prompts(read, ('one {}', '{}!'))
    assert texts[:2] == ['one a <b>boot</b>', 'a <b>boot</b>!']
    assert texts[2:] == ['one {bag} &amp;\u2028co', '{bag} &amp;\u2028co!']
    (tmp_path / 'blank.txt').write_text('boot\n \nbag\n')
    with pytest.raises(UserError, match='line 2 of .*blank.txt is blank'):
        prompts.labels_of(str(tmp_path / 'blank.txt'), classes)
    canonical = prompts.prompts(("Hermit_Crab's",), ('A  photo, of a {}.', '{}'), canonical=True)
    assert canonical == ['a photo of a hermit crabs', 'hermit crabs']
    for labels, words in [
        (('a',), '1 labels'), (('a', ' '), 'not a text'), ('nothing', 'no file, and not imagenet'),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            prompts.labels_of(labels, classes)
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9\nbag\n')
    with pytest.raises(UserError, match='not UTF-8 at byte 3'):
        prompts.labels_of(str(tmp_path / 'latin.txt'), classes)
    for template in ('a photo', '{} and {}'):
        with pytest.raises(UserError, match='places {}'):
            prompts.templates_of((template,))


def test_names_and_templates_of_clip_come_from_its_package(tmp_path, monkeypatch):
    prompts.of_open_clip.cache_clear()
    monkeypatch.setitem(sys.modules, 'open_clip', None)
    with pytest.raises(UserError, match='open_clip_torch'):
        prompts.templates_of('openai_7')
    monkeypatch.delitem(sys.modules, 'open_clip')
    package = tmp_path / 'open_clip'
    package.mkdir()
    (package / '__init__.py').write_text('raise RuntimeError("imported")')
    (package / 'zero_shot_metadata.py').write_text(
        "SIMPLE_IMAGENET_TEMPLATES = (lambda c: f'a {c}.',)\nIMAGENET_CLASSNAMES = ['tench']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert prompts.templates_of('openai_7') == ('a {}.',)
    assert prompts.labels_of('imagenet', ('n01440764',)) == ('tench',)
    prompts.of_open_clip.cache_clear()
