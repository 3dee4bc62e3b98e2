"""Zero-shot commands on two towers of transformers, beside transformers."""

import json
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
import words
from ml_collections import ConfigDict
from PIL import Image

import vit_jax
from vit_jax import evaluate as evaluation
from vit_jax import evaluators, models, sharding
from vit_jax.data import tasks
from vit_jax.data.tokenizers import Named
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate, settings_of
from vit_jax.evaluators import embeddings
from vit_jax.figures import labelled, style
from vit_jax.predict import __main__ as command
from vit_jax.predict import by_labels, predicted, read_ahead

LABELS = ('a red dog', 'the bag', "it's a <b>shoe</b>, {really} & more", 'x' * 200)
SIZE = 32


def images_of(folder, count=6):
    """Images in two folders, whose names are classes."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        place = folder / ('a_red_dog', 'bag')[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f'{i}.png')
        paths.append(str(place / f'{i}.png'))
    return paths


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """(folder of a CLIP with random weights and a tokenizer, the model of transformers)."""
    folder = words.clip(tmp_path_factory.mktemp('clip'))
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    vocabulary = len(json.loads((folder / 'vocab.json').read_text()))
    text = dict(
        vocab_size=vocabulary, max_position_embeddings=16, bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1, **size,
    )  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config=dict(image_size=SIZE, patch_size=8, **size),
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    model.save_pretrained(folder)
    return folder, model


def logits_of(model, folder, paths, texts):
    """Logits [images, texts] of transformers for the images that ours reads."""
    ours, _ = vit_jax.load(folder)
    pixels = torch.tensor(np.asarray(vit_jax.preprocess(ours, paths))).permute(0, 3, 1, 2)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(list(texts), padding='max_length', max_length=16, truncation=True,
                    return_tensors='pt')  # fmt: skip
    with torch.no_grad():
        return model(**ids, pixel_values=pixels.float()).logits_per_image.double().numpy()


def softmax(x):
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


def test_probabilities_of_labels_are_those_of_transformers(checkpoint, tmp_path):
    folder, model = checkpoint
    paths = images_of(tmp_path)
    found = by_labels.predictor(str(folder), LABELS)
    view = tasks.fixed_view(found.view, found.image_size)
    rows = dict(predicted(found, read_ahead(paths, view, 2), 4))
    wanted = softmax(logits_of(model, folder, paths, LABELS))
    for path, row in zip(paths, wanted, strict=True):
        np.testing.assert_allclose(rows[path], row, atol=1e-5)


def test_evaluation_of_a_public_checkpoint_is_that_of_transformers(checkpoint, tmp_path):
    folder, model = checkpoint
    paths = images_of(tmp_path / 'images', 10)
    (tmp_path / 'config.py').write_text(
        'from ml_collections import ConfigDict\n'
        'def get_config(arg=None):\n'
        f'    source = dict(name={str(tmp_path / "images")!r})\n'
        '    return ConfigDict(dict(steps=1, data=dict(\n'
        f'        source=source, image_size={SIZE}, batch_size=8, view="central",\n'
        '    ), evals=dict(zero=dict(\n'
        '        type="zero_shot", source=source, view="central",\n'
        '        templates=("a photo of a {}", "{} next to it")))))\n'
    )
    config = settings_of(str(tmp_path / 'config.py'), str(folder), [])
    ((name, metrics, _),) = evaluate(str(folder), config)
    templates = ('a photo of a {}', '{} next to it')
    texts = [t.format(c) for c in ('a red dog', 'bag') for t in templates]
    scale = float(model.logit_scale.detach().exp())
    cosines = logits_of(model, folder, paths, texts) / scale
    logits = cosines.reshape(len(paths), 2, 2).mean(axis=2)  # of means, not yet of unit length
    with torch.no_grad():
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        ids = tokenizer(texts, padding='max_length', max_length=16, return_tensors='pt')
        found = model.get_text_features(**ids)
        found = getattr(found, 'pooler_output', found).double().numpy()
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    logits /= np.linalg.norm(found.reshape(2, 2, -1).mean(axis=1), axis=1)
    labels = np.array(['bag' in path.split('/')[-2] for path in paths]).astype(int)
    assert name == 'zero' and metrics['examples'] == 10
    assert np.isclose(metrics['accuracy'], np.mean(logits.argmax(axis=1) == labels))
    loss = -np.log(softmax(scale * logits)[np.arange(10), labels]).mean()
    assert np.isclose(metrics['loss'], loss, rtol=1e-4)


@pytest.mark.parametrize('fields', [
    dict(pool='map'), dict(pool='gap', last_norm='pooled', num_classes=12),
    dict(pool='gap', representation_size=20, num_classes=12, style=dict(norm='rms')),
])  # fmt: skip
def test_the_patch_of_an_image_of_one_is_embedded_as_that_image(fields):
    model = models.build(
        'vit/8', **dict(num_classes=None, width=16, depth=1, num_heads=2, mlp_dim=32) | fields
    )
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)['params']
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    image, out = model.apply({'params': params}, images)
    found = by_labels.patch_embeddings(model, params, out['encoded'])
    wanted = image / np.linalg.norm(image, axis=1, keepdims=True)
    np.testing.assert_allclose(found[:, 0], wanted, atol=1e-5)


def test_a_picture_of_images_beside_texts(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 16, 20, 3), dtype=np.uint8)
    cosines, maps = rng.random((3, 4)), rng.random((3, 4, 2, 2))
    sizes = []
    for name, shown in (('matrix', None), ('maps', maps)):
        labelled.draw(tmp_path / f'{name}.png', images, LABELS, cosines, shown)
        with Image.open(tmp_path / f'{name}.png') as picture:
            sizes.append(picture.size)
    assert sizes[0][0] < sizes[1][0] and sizes[0][1] < sizes[1][1]


def more_tokens(folder, out):
    """A tokenizer in `out` like that in `folder`, with a token more."""
    out.mkdir()
    for name in ('merges.txt', 'tokenizer_config.json'):
        (out / name).write_bytes((folder / name).read_bytes())
    tokens = json.loads((folder / 'vocab.json').read_text())
    (out / 'vocab.json').write_text(json.dumps(tokens | {'more</w>': len(tokens)}))
    return str(out)


def test_a_tokenizer_of_other_ids_is_logged(checkpoint, tmp_path, caplog):
    folder = str(checkpoint[0])
    by_labels.predictor(folder, LABELS, tokenizer=folder)
    assert 'makes other ids' not in caplog.text
    by_labels.predictor(folder, LABELS, tokenizer=str(words.bert(tmp_path / 'bert')))
    assert f'makes other ids than {tmp_path}/bert' in caplog.text
    subject = evaluators.Subject(None, None, {}, {}, {}, Named(folder))
    caplog.clear()
    embeddings.tokenizer_of(subject, str(tmp_path / 'bert'))
    assert f'makes other ids than {tmp_path}/bert' in caplog.text


def test_a_tokenizer_of_tokens_that_the_model_does_not_have_is_refused(checkpoint, tmp_path):
    folder, _ = checkpoint
    address = more_tokens(folder, tmp_path / 'more')
    with pytest.raises(UserError, match='more has .* tokens, and the model'):
        by_labels.predictor(str(folder), LABELS, tokenizer=address)
    size, mesh = (SIZE, SIZE), sharding.make_mesh(jax.devices()[:1])
    found = evaluation.read(str(folder), size, ConfigDict(), None, None)
    subject = evaluation.subject_of(found, size, mesh, 'softmax', str(folder))
    assert embeddings.tokenizer_of(subject, str(folder)).length == 16
    with pytest.raises(UserError, match='more has .* tokens, and the model'):
        embeddings.tokenizer_of(subject, address)


def test_labels_whose_probabilities_say_nothing_are_refused(checkpoint):
    with pytest.raises(UserError, match="'a bag' 2 times"):
        by_labels.check_distinct(('a bag', 'a shoe', 'a bag'))
    with pytest.raises(UserError, match="'a bag' alone"):
        by_labels.predictor(str(checkpoint[0]), ('a bag',))


def test_a_file_that_is_not_there_is_no_label():
    for address in ('lables.txt', '/tmp', 'gs://bucket/labels', 'imagenet', __file__):
        assert by_labels.is_address(address), address
    for label in ('a dog', 'a photo of a dog.', 'e.g. 3.5', 'U.S.', 'x'):
        assert not by_labels.is_address(label), label


def test_maps_need_embeddings_of_patches_alone(checkpoint, monkeypatch):
    read = by_labels.weights.read

    def pooled_by_both(*args, **settings):
        found = read(*args, **settings)
        image = found.model.image.clone(pool='cls_gap')
        return found._replace(model=found.model.clone(image=image))

    monkeypatch.setattr(by_labels.weights, 'read', pooled_by_both)
    with pytest.raises(UserError, match='leave out --maps'):
        by_labels.predictor(str(checkpoint[0]), LABELS, drawn='maps')


def test_labels_that_are_cut_are_logged_once(checkpoint, caplog):
    by_labels.predictor(str(checkpoint[0]), ('the bag', 'x' * 200, 'dog ' * 14, 'dog ' * 15))
    [line] = [r.getMessage() for r in caplog.records if 'are cut' in r.getMessage()]
    assert line.startswith('2 of 4 texts are cut to the 16 tokens of the tokenizer (')
    assert "such as 'xxx" in line
    named = Named(str(checkpoint[0]))
    for text in ('dog ' * 14, 'dog ' * 15, 'dog ' * 16):
        named(text)
    [_, line] = [r.getMessage() for r in caplog.records if 'cut' in r.getMessage()]
    assert line.startswith('a text is cut to') and line.endswith(' of 17 tokens')


def test_a_checkpoint_without_a_tokenizer_says_how_to_name_one(checkpoint, tmp_path):
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).symlink_to(checkpoint[0] / name)
    with pytest.raises(UserError, match='has no tokenizer: .*; --tokenizer names another'):
        by_labels.predictor(str(tmp_path), LABELS)
    size, mesh = (SIZE, SIZE), sharding.make_mesh(jax.devices()[:1])
    found = evaluation.read(str(tmp_path), size, ConfigDict(), None, None)
    subject = evaluation.subject_of(found, size, mesh, 'softmax', str(tmp_path))
    with pytest.raises(UserError, match=r'has no tokenizer: .*evals\.NAME\.tokenizer\) names one'):
        embeddings.tokenizer_of(subject, None)('a dog')


@pytest.mark.parametrize('given, drawn, words', [
    (dict(labels=['a', 'b'], out='x.npz'), False, '--labels prints classes, or draws them'),
    (dict(labels=['a', 'b'], features='x.npz'), False, '--labels prints classes'),
    (dict(labels=['a', 'b'], maps=True), False, '--maps draws where texts are; give --labels and'),
    (dict(maps=True, out='x.png'), False, '--maps draws where texts are'),
    (dict(templates=['a {}.']), False, '--templates is for the texts of --labels'),
    (dict(tokenizer='x'), False, '--tokenizer is for the texts of --labels'),
    (dict(labels=['a', 'b'], out='x.png', maps=True, tokenizer='x'), True, None),
])  # fmt: skip
def test_flags_of_labels_that_nothing_reads_are_refused(given, drawn, words):
    plain = dict(labels=None, out=None, features=None, maps=False, templates=['{}'], tokenizer=None)
    options = SimpleNamespace(**plain | given)
    if words is None:
        command.check_labels(options, drawn)
        return
    with pytest.raises(UserError, match=words):
        command.check_labels(options, drawn)


def test_what_the_font_cannot_draw_is_in_words(tmp_path):
    cells = [np.zeros((8, 8, 3), np.uint8)], ['a dog \U0001f415', '\u65e5', 'caf\xe9'], np.eye(1, 3)
    with warnings.catch_warnings(action='error'):
        labelled.draw(tmp_path / 'x.png', *cells)
    assert style.drawable('a \U0001f415 caf\xe9 \u65e5') == 'a :dog: caf\xe9 \\u65e5'


def test_a_checkpoint_of_one_tower_is_named():
    with pytest.raises(UserError, match='an image and a text tower'):
        by_labels.predictor('tests/data/big_vision_map_learn.npz', LABELS)
