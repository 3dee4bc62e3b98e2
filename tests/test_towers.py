"""Image towers of transformers, by themselves and beside a text tower: loaded, and written back."""

import json

import numpy as np
import pytest
from compared import assert_close, done, outputs, random_images, randomised
from safetensors.numpy import load_file

import vit_jax
from vit_jax.convert import load
from vit_jax.errors import UserError

VISION = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
    image_size=16, patch_size=4,
)  # fmt: skip
NAFLEX = {k: v for k, v in VISION.items() if k != 'image_size'} | dict(num_patches=16)
TEXT = dict(
    hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48, vocab_size=9,
    max_position_embeddings=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LABELS = dict(id2label={0: 'ant', 1: 'bee', 2: 'cat', 3: 'dog', 4: 'eel'})
TANH = dict(hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-3)
KINDS = {  # {class: arguments of its config}
    'CLIPVisionModel': VISION,
    'CLIPVisionModelWithProjection': VISION | TANH | dict(projection_dim=10),
    'CLIPForImageClassification': dict(vision_config=VISION, **LABELS),
    'CLIPModel': dict(vision_config=VISION, text_config=TEXT, projection_dim=10),
    'MetaClip2VisionModelWithProjection': VISION | dict(hidden_act='gelu', projection_dim=10),
    'AltCLIPModel': dict(vision_config=VISION, text_config=TEXT | dict(project_dim=10),
                         projection_dim=10),
    'ChineseCLIPVisionModel': VISION,
    'CLIPSegVisionModel': VISION,
    'OwlViTVisionModel': VISION,
    'SiglipVisionModel': VISION,
    'SiglipForImageClassification': dict(vision_config=VISION, text_config=TEXT, **LABELS),
    'SiglipModel': dict(vision_config=VISION | TANH, text_config=TEXT),
    'Siglip2VisionModel': NAFLEX,
    'Siglip2ForImageClassification': dict(vision_config=NAFLEX, text_config=TEXT, **LABELS),
    'BlipVisionModel': VISION,
}  # fmt: skip
WRITTEN = (  # and loaded by the same class
    'CLIPVisionModel', 'CLIPVisionModelWithProjection', 'CLIPForImageClassification',
    'SiglipVisionModel', 'SiglipForImageClassification', 'Siglip2VisionModel',
    'Siglip2ForImageClassification', 'BlipVisionModel',
)  # fmt: skip
UNREAD = 'head.', 'post_layernorm.'  # of the tower of a classifier, which pools itself


def made(name, folder):
    """A tiny model of transformers with random weights, which is saved to the folder."""
    transformers = pytest.importorskip('transformers')
    kind = getattr(transformers, name)
    config = kind.config_class(**KINDS[name])
    module = randomised(kind(config))
    module.save_pretrained(folder)
    return module


def expected(module, images, **options):
    """(output or None, tokens or None) of transformers for images [B, H, W, C]."""
    torch = pytest.importorskip('torch')
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    inputs = dict(pixel_values=x, **options)
    if 'Siglip2' in type(module).__name__:
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.tensor([[h // 4, w // 4]] * b)
        x = x.reshape(b, h * w // 16, -1)
        inputs = dict(pixel_values=x, pixel_attention_mask=torch.ones(x.shape[:2]),
                      spatial_shapes=shapes)  # fmt: skip
    with torch.no_grad():
        if hasattr(module, 'get_image_features'):
            out = module.get_image_features(**inputs).pooler_output
            return out.numpy(), module.vision_model(**inputs).last_hidden_state.numpy()
        out = module(**inputs)
    tokens = getattr(out, 'last_hidden_state', None)
    tokens = None if tokens is None else tokens.numpy()
    if 'Blip' in type(module).__name__:
        return tokens, tokens
    output = next(out[key] for key in ('logits', 'image_embeds', 'pooler_output') if key in out)
    return output.numpy(), tokens


def assert_as(module, model, params, images, **options):
    output, tokens = expected(module, images, **options)
    ours, out = outputs(model, params, images)
    assert_close(ours, output)
    if tokens is not None:
        assert_close(out['encoded'], tokens[:, sum(model.prefix.values()) :])


@pytest.mark.parametrize('name', KINDS)
def test_a_tower_loads(name, tmp_path):
    module = made(name, tmp_path)
    two = 'text_config' in KINDS[name] and 'ForImage' not in name
    if two:
        with pytest.raises(UserError, match="a text tower; give part='image'"):
            load.read(tmp_path)
    read = load.read(tmp_path, part='image' if two else None)
    assert read.image_size == (16, 16)
    assert_as(module, read.model, read.params, random_images(2, 16, 16, 3))
    zeros = done(read.account).get('re-initialised', set())
    assert zeros <= {'embedding/bias', 'head/bias'} and (read.model.pre_norm or not zeros)
    unused = done(read.account).get('unused', set())
    if 'Classification' in name:
        assert read.classes == ('ant', 'bee', 'cat', 'dog', 'eel')
        assert unused and all(array.startswith(UNREAD) for array in unused)
    elif two:
        assert {'logit_scale'} < unused and not any('vision' in array for array in unused)
    else:
        assert not unused


@pytest.mark.parametrize('name', ['CLIPVisionModel', 'SiglipVisionModel', 'Siglip2VisionModel'])
def test_a_tower_resizes(name, tmp_path):
    module = made(name, tmp_path)
    model, params = vit_jax.load(tmp_path, image_size=(24, 12))
    options = dict(interpolate_pos_encoding=True) if '2' not in name else {}
    assert_as(module, model, params, random_images(2, 24, 12, 3), **options)


@pytest.mark.parametrize('name', WRITTEN)
def test_a_tower_is_written_as_transformers_wrote_it(name, tmp_path):
    module = made(name, tmp_path / 'a')
    read = load.read(tmp_path / 'a')
    vit_jax.save(tmp_path / 'b', read.model, read.params, 'hf', classes=read.classes,
                 image_size=16, view='resize')  # fmt: skip
    a, b = (load_file(tmp_path / x / 'model.safetensors') for x in 'ab')
    unread = [n for n in a if n.removeprefix('vision_model.').startswith(UNREAD)]
    for n in a if 'Classification' not in name else a.keys() - unread:
        assert a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes(), n
    assert b.keys() <= a.keys()
    again, info = type(module).from_pretrained(tmp_path / 'b', output_loading_info=True)
    assert not any(info.values()), info
    images = random_images(2, 16, 16, 3)
    x, y = (expected(m, images)[0] for m in (module, again.eval()))
    np.testing.assert_array_equal(x, y)
    assert again.config.architectures == module.config.architectures
    back = load.read(tmp_path / 'b')
    assert back.model == read.model and back.classes == read.classes
    assert back.input_size == (16, 16)
    settings = json.loads((tmp_path / 'b' / 'preprocessor_config.json').read_text())
    kind = 'CLIP' if name.startswith('CLIP') else name.partition('Vision')[0].partition('For')[0]
    assert settings['image_processor_type'] == f'{kind}ImageProcessor'


def rewritten(folder, changes):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize('changes, words', [
    (dict(model_type='xclip'), "'xclip' has attention between the frames of a video"),
    (dict(model_type='llava'), "model_type is 'llava', but the arrays are those of clip or"),
    (dict(image_size=32), '32 x 32, which has 8 x 8 patches, but the position table has 16'),
    (dict(intermediate_size=40), 'intermediate_size is 40, but the arrays have 48'),
    (dict(hidden_act='relu'), "hidden_act 'relu' is none of"),
])  # fmt: skip
def test_a_config_that_contradicts_a_tower_is_refused(changes, words, tmp_path):
    made('CLIPVisionModel', tmp_path)
    rewritten(tmp_path, changes)
    with pytest.raises(UserError, match=words):
        load.read(tmp_path)


def test_a_bias_that_clip_lacks_is_not_dropped(tmp_path):
    made('CLIPVisionModelWithProjection', tmp_path / 'a')
    model, params = vit_jax.load(tmp_path / 'a')
    head = dict(params['head'], bias=params['head']['bias'] + 1)
    with pytest.raises(UserError, match='cannot express visual_projection.bias of this model'):
        vit_jax.save(tmp_path / 'b', model, params | dict(head=head), 'hf')
    assert not (tmp_path / 'b').exists()


def test_keys_around_those_of_the_tower_are_read(tmp_path):
    made('SiglipModel', tmp_path)
    rewritten(tmp_path, dict(novelty=3))
    config = json.loads((tmp_path / 'config.json').read_text())
    config['vision_config'] |= dict(top_p=1.0, id2label={'0': 'LABEL_0', '1': 'LABEL_1'})
    (tmp_path / 'config.json').write_text(json.dumps(config))
    read = load.read(tmp_path, part='image')
    assert done(read.account)['ignored'] == {'config.json: novelty'}
    assert read.model.epsilon == 1e-3 and read.model.gelu == 'tanh' and read.classes is None
