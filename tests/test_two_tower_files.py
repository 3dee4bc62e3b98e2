"""Files of two towers: what transformers computes of them, and what is written back."""

import json

import jax
import kinds
import numpy as np
import pytest
import words
from compared import assert_close, done, random_images, randomised
from safetensors.numpy import load_file, save_file

import vit_jax
from vit_jax import assembly, config, models
from vit_jax.convert import load, run
from vit_jax.data import pipeline
from vit_jax.errors import UserError
from vit_jax.models import interface
from vit_jax.models.parameters import named_leaves
from vit_jax.models.text import Text
from vit_jax.models.two_towers import TwoTowers

VISION = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
    image_size=16, patch_size=4,
)  # fmt: skip
NAFLEX = {k: v for k, v in VISION.items() if k != 'image_size'} | dict(num_patches=16)
TEXT = dict(
    hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
    vocab_size=32, max_position_embeddings=6, pad_token_id=1, bos_token_id=30, eos_token_id=31,
)  # fmt: skip
NARROW = TEXT | dict(hidden_size=16)
KINDS = {  # {name: (class, arguments of its config)}
    'clip': ('CLIPModel', dict(vision_config=VISION, text_config=NARROW, projection_dim=10)),
    'clip of the highest id': ('CLIPModel', dict(
        vision_config=VISION, text_config=NARROW | dict(eos_token_id=2, hidden_act='gelu'),
        projection_dim=10,
    )),
    'metaclip': ('MetaClip2Model', dict(
        vision_config=VISION, text_config=NARROW | dict(eos_token_id=2), projection_dim=10,
    )),
    'siglip': ('SiglipModel', dict(
        vision_config=VISION, text_config=NARROW | dict(projection_size=24),
    )),
    'siglip2': ('Siglip2Model', dict(vision_config=NAFLEX, text_config=TEXT)),
}  # fmt: skip
WRITTEN = ('clip', 'clip of the highest id', 'siglip', 'siglip2')
TOKENS = np.array([[30, 5, 31, 4, 31, 1], [30, 2, 9, 8, 7, 31], [30, 31, 2, 6, 1, 1]])
BLOCK = (  # layers of big_vision and of transformers
    ('LayerNorm_0', 'layer_norm1'), ('LayerNorm_1', 'layer_norm2'),
    ('MlpBlock_0/Dense_0', 'mlp.fc1'), ('MlpBlock_0/Dense_1', 'mlp.fc2'),
)  # fmt: skip


def made(name, folder):
    """A tiny model of transformers with random weights, which is saved to the folder."""
    transformers = pytest.importorskip('transformers')
    kind, fields = KINDS[name]
    kind = getattr(transformers, kind)
    module = randomised(kind(kind.config_class(**fields)))
    module.save_pretrained(folder)
    return module


def expected(module, images, tokens, **options):
    """{logits, image, text} of transformers for images [B, H, W, C] and tokens [B, L]."""
    torch = pytest.importorskip('torch')
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    inputs = dict(pixel_values=x, **options)
    if 'Siglip2' in type(module).__name__:
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 16 * c)
        inputs = dict(pixel_values=x, pixel_attention_mask=torch.ones(x.shape[:2]),
                      spatial_shapes=torch.tensor([[h // 4, w // 4]] * b))  # fmt: skip
    with torch.no_grad():
        out = module(input_ids=torch.from_numpy(tokens), **inputs)
    return dict(logits=out.logits_per_image.numpy(), image_embedding=out.image_embeds.numpy(),
                text_embedding=out.text_embeds.numpy())  # fmt: skip


def ours(model, params, images, tokens):
    with jax.default_matmul_precision('highest'):
        apply = jax.jit(lambda p: model.apply({'params': p}, images, tokens))
        logits, out = jax.device_get(apply(params))
    return dict(logits=logits, **{k: out[k] for k in ('image_embedding', 'text_embedding')})


def assert_as(wanted, model, params, images, tokens=TOKENS):
    for name, found in ours(model, params, images, tokens).items():
        assert_close(found, wanted[name])


@pytest.mark.parametrize('name', KINDS)
def test_two_towers_load(name, tmp_path):
    module, images = made(name, tmp_path), random_images(3, 16, 16, 3)
    model, params = vit_jax.load(tmp_path)
    assert isinstance(model, TwoTowers) and model.metadata.image_size == (16, 16)
    wanted = expected(module, images, TOKENS)
    assert_as(wanted, model, params, images)
    account = done(load.read(tmp_path, whole=True).account)
    assert account.keys() <= {'loaded', 're-initialised', 'guessed', 'ignored'}
    assert account['loaded'] >= {'logit_scale', 'text_model.embeddings.token_embedding.weight'}
    with pytest.raises(UserError, match="a text tower; give part='image'"):
        load.read(tmp_path)
    image, weights = vit_jax.load(tmp_path, part='image')
    jax.tree.map(np.testing.assert_array_equal, weights, params['image'])
    assert image == model.image.clone(head_std=0.0)
    words, weights = vit_jax.load(tmp_path, part='text')
    assert isinstance(words, Text)
    jax.tree.map(np.testing.assert_array_equal, weights, params['text'])
    x = np.asarray(jax.jit(lambda p: words.apply({'params': p}, TOKENS)[0])(weights))
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert_close(x, wanted['text_embedding'])


@pytest.mark.parametrize('name', ['clip', 'siglip'])
def test_the_image_tower_resizes(name, tmp_path):
    module, images = made(name, tmp_path), random_images(3, 24, 12, 3)
    model, params = vit_jax.load(tmp_path, image_size=(24, 12))
    wanted = expected(module, images, TOKENS, interpolate_pos_encoding=True)
    assert_as(wanted, model, params, images)


def test_naflex_at_other_aspect_ratios(tmp_path):
    """Against one padded batch of transformers, with a mask and the grid of each image."""
    import torch

    module = made('siglip2', tmp_path)
    grids, rng, most = [(4, 4), (2, 7), (5, 3), (1, 9)], np.random.default_rng(0), 18
    images = [rng.normal(size=(4 * h, 4 * w, 3)).astype(np.float32) for h, w in grids]
    patches = np.zeros((len(grids), most, 48), np.float32)
    for row, image, (h, w) in zip(patches, images, grids, strict=True):
        row[: h * w] = image.reshape(h, 4, w, 4, 3).transpose(0, 2, 1, 3, 4).reshape(h * w, 48)
    mask = [[int(k < h * w) for k in range(most)] for h, w in grids]
    with torch.no_grad():
        wanted = module.vision_model(
            pixel_values=torch.from_numpy(patches), pixel_attention_mask=torch.tensor(mask),
            spatial_shapes=torch.tensor(grids),
        ).pooler_output.numpy()  # fmt: skip
    for image, one in zip(images, wanted, strict=True):
        model, params = vit_jax.load(tmp_path, part='image', image_size=image.shape[:2])
        assert_close(np.asarray(model.apply({'params': params}, image[None])[0][0]), one)
    with pytest.raises(UserError, match=r'load\(path, image_size=\(8, 28\)\)'):
        model, params = vit_jax.load(tmp_path, part='image')
        model.apply({'params': params}, images[1][None])


@pytest.mark.parametrize('name', WRITTEN)
def test_two_towers_are_written_as_transformers_wrote_them(name, tmp_path):
    module = made(name, tmp_path / 'a')
    model, params = vit_jax.load(tmp_path / 'a')
    vit_jax.save(tmp_path / 'b', model, params, 'hf')
    a, b = (load_file(tmp_path / x / 'model.safetensors') for x in 'ab')
    assert a.keys() == b.keys()
    for n in a:
        assert a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes(), n
    again, info = type(module).from_pretrained(tmp_path / 'b', output_loading_info=True)
    assert not any(info.values()), info
    images = random_images(3, 16, 16, 3)
    x, y = (expected(m, images, TOKENS) for m in (module, again.eval()))
    jax.tree.map(np.testing.assert_array_equal, x, y)
    back = vit_jax.load(tmp_path / 'b')[0]
    assert back == model and back.metadata.image_size == (16, 16)


def of_big_vision(module):
    """{name: array} of big_vision's file, of a SiglipModel; kernels lie the other way round there.

    The mapping is that of transformers' convert_siglip_to_hf.py, backwards.
    """
    theirs, found = {n: x.numpy() for n, x in module.state_dict().items()}, {}

    def dense(ours, name, shape=None):
        kernel = theirs[f'{name}.weight'].T
        found[f'{ours}/kernel'] = kernel.reshape(shape or kernel.shape)
        found[f'{ours}/bias'] = theirs[f'{name}.bias'].reshape(shape[1:] if shape else -1)

    def norm(ours, name):
        found[f'{ours}/scale'] = theirs[f'{name}.weight']
        found[f'{ours}/bias'] = theirs[f'{name}.bias']

    def block(ours, name, width, heads):
        for a, b in BLOCK:
            (norm if 'Norm' in a else dense)(f'{ours}/{a}', f'{name}.{b}')
        attention = f'{ours}/MultiHeadDotProductAttention_0'
        for part in ('query', 'key', 'value'):
            shape = width, heads, width // heads
            dense(f'{attention}/{part}', f'{name}.self_attn.{part[0]}_proj', shape)
        dense(f'{attention}/out', f'{name}.self_attn.out_proj')
        shape = heads, width // heads, width
        found[f'{attention}/out/kernel'] = found[f'{attention}/out/kernel'].reshape(shape)

    for tower, name, encoder, depth, width, heads in (
        ('img', 'vision_model', 'Transformer', 2, 24, 3),
        ('txt', 'text_model', 'Encoder_0', 3, 16, 4),
    ):
        for i in range(depth):
            theirs_i = f'{name}.encoder.layers.{i}'
            block(f'{tower}/{encoder}/encoderblock_{i}', theirs_i, width, heads)
        last = 'post_layernorm' if tower == 'img' else 'final_layer_norm'
        norm(f'{tower}/{encoder}/encoder_norm', f'{name}.{last}')
        table = theirs[f'{name}.embeddings.position_embedding.weight']
        found[f'{tower}/pos_embedding'] = table[None]
    patches = theirs['vision_model.embeddings.patch_embedding.weight']
    found['img/embedding/kernel'] = patches.transpose(2, 3, 1, 0)
    found['img/embedding/bias'] = theirs['vision_model.embeddings.patch_embedding.bias']
    head = 'img/MAPHead_0/MultiHeadDotProductAttention_0'
    for i, part in enumerate(('query', 'key', 'value')):
        for kind in ('weight', 'bias'):
            whole = theirs[f'vision_model.head.attention.in_proj_{kind}']
            theirs[f'{part}.{kind}'] = whole[24 * i : 24 * i + 24]
        dense(f'{head}/{part}', part, (24, 3, 8))
    dense(f'{head}/out', 'vision_model.head.attention.out_proj')
    found[f'{head}/out/kernel'] = found[f'{head}/out/kernel'].reshape(3, 8, 24)
    norm('img/MAPHead_0/LayerNorm_0', 'vision_model.head.layernorm')
    for i in (0, 1):
        dense(f'img/MAPHead_0/MlpBlock_0/Dense_{i}', f'vision_model.head.mlp.fc{i + 1}')
    found['img/MAPHead_0/probe'] = theirs['vision_model.head.probe']
    found['txt/Embed_0/embedding'] = theirs['text_model.embeddings.token_embedding.weight']
    dense('txt/head', 'text_model.head')
    found['t'], found['b'] = theirs['logit_scale'], theirs['logit_bias']
    return {n: np.ascontiguousarray(x) for n, x in found.items()}


def test_big_vision_both_ways(tmp_path):
    module, images = made('siglip', tmp_path / 'hf'), random_images(3, 16, 16, 3)
    arrays, wanted = of_big_vision(module), expected(module, images, TOKENS)
    for prefix in ('', 'params/'):
        np.savez(tmp_path / 'a.npz', **{prefix + n: x for n, x in arrays.items()})
        model, params = vit_jax.load(tmp_path / 'a.npz')
        assert_as(wanted, model, params, images)
    vit_jax.save(tmp_path / 'b.npz', model, params, 'big_vision')
    with np.load(tmp_path / 'b.npz') as back:
        assert {n.removeprefix('params/') for n in back} == arrays.keys()
        for n, x in arrays.items():
            assert back[f'params/{n}'].shape == x.shape, n
            np.testing.assert_array_equal(back[f'params/{n}'], x)
    first = model.clone(text=model.text.clone(pool='first'))
    vit_jax.save(tmp_path / 'c.npz', first, params, 'big_vision')
    assert vit_jax.load(tmp_path / 'c.npz')[0] == first
    vit_jax.save(tmp_path / 'again', model, params, 'hf')
    a, b = (load_file(tmp_path / x / 'model.safetensors') for x in ('hf', 'again'))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    by_name = vit_jax.load(f'{tmp_path}/a.npz:txt')
    jax.tree.map(np.testing.assert_array_equal, by_name[1], params['text'])


def test_variants_of_big_vision(tmp_path):
    """No bias (LiT), positions twice (old files), stacked blocks: the same two towers."""
    module, images = made('siglip', tmp_path / 'hf'), random_images(3, 16, 16, 3)
    arrays, wanted = of_big_vision(module), expected(module, images, TOKENS)
    bias = arrays.pop('b')
    half = arrays['txt/pos_embedding'] / 2
    arrays |= {'txt/pos_embedding': half, 'txt/Encoder_0/pos_embedding': half}
    for kind in {n.split('encoderblock_0/')[1] for n in arrays if 'txt/' in n and '_0/' in n
                 and 'encoderblock_0/' in n}:  # fmt: skip
        each = [arrays.pop(f'txt/Encoder_0/encoderblock_{i}/{kind}') for i in range(3)]
        arrays[f'txt/Encoder_0/encoderblock/{kind}'] = np.stack(each)
    np.savez(tmp_path / 'a.npz', **arrays)
    model, params = vit_jax.load(tmp_path / 'a.npz')
    assert not model.use_bias and 'bias' not in params
    wanted['logits'] = wanted['logits'] - bias
    assert_as(wanted, model, params, images)
    np.savez(tmp_path / 'b.npz', **arrays | {'txt/BertModel_0/x': bias})
    with pytest.raises(UserError, match=r'array txt/BertModel_0/x \[1\] belongs to neither tower'):
        vit_jax.load(tmp_path / 'b.npz')
    np.savez(tmp_path / 'c.npz', **{n: x for n, x in arrays.items() if n != 't'})
    with pytest.raises(UserError, match='two towers, but no temperature'):
        vit_jax.load(tmp_path / 'c.npz')


def of_open_clip(module, prefix):
    """{name: array} of OpenCLIP's file, of a CLIPModel; query, key and value are one array."""
    names = {
        'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2', 'mlp.fc1': 'mlp.c_fc',
        'mlp.fc2': 'mlp.c_proj', 'self_attn.out_proj': 'attn.out_proj',
        'embeddings.class_embedding': 'class_embedding', 'embeddings.patch_embedding': 'conv1',
        'pre_layrnorm': 'ln_pre', 'post_layernorm': 'ln_post',
        'embeddings.position_embedding.weight': 'positional_embedding',
        'embeddings.token_embedding': 'token_embedding', 'final_layer_norm': 'ln_final',
        'encoder.layers': 'transformer.resblocks', 'vision_model.': 'visual.',
        'text_model.': prefix,
    }  # fmt: skip
    found, theirs = {}, {n: x.numpy() for n, x in module.state_dict().items()}
    for n in [n for n in theirs if '.q_proj.' in n]:
        joined = [theirs.pop(n.replace('q_proj', f'{k}_proj')) for k in 'qkv']
        theirs[n.replace('q_proj.', 'in_proj_')] = np.concatenate(joined)
    for n, x in theirs.items():
        for a, b in names.items():
            n = n.replace(a, b)
        found[n.replace('self_attn', 'attn')] = x
    found['visual.proj'] = found.pop('visual_projection.weight').T
    found[f'{prefix}text_projection'] = found.pop('text_projection.weight').T
    return {n: np.ascontiguousarray(x) for n, x in found.items()}


@pytest.mark.parametrize('prefix, name', [('', 'clip of the highest id'), ('text.', 'clip')])
def test_open_clip(prefix, name, tmp_path):
    module, images = made(name, tmp_path), random_images(3, 16, 16, 3)
    folder = tmp_path / 'open'
    folder.mkdir()
    save_file(of_open_clip(module, prefix), folder / 'open_clip_model.safetensors')
    vision = dict(layers=2, width=24, head_width=8, patch_size=4, image_size=16, mlp_ratio=2.0,
                  final_ln_after_pool=True)  # fmt: skip
    text = dict(layers=3, width=16, heads=4, mlp_ratio=2.5, context_length=6, vocab_size=32)
    text |= dict(pool_type='eos', eos_id=31) if prefix else {}
    quick = name == 'clip'
    model = dict(embed_dim=10, quick_gelu=quick, vision_cfg=vision, text_cfg=text)
    config = folder / 'open_clip_config.json'
    config.write_text(json.dumps(dict(model_cfg=model, preprocess_cfg={})))
    gelu = {} if quick else dict(gelu='quick')  # transformers' image tower has it in any case
    model, params = vit_jax.load(folder, **gelu)
    assert model.text.eos_id == (31 if prefix else None)
    assert_as(expected(module, images, TOKENS), model, params, images)
    for key, value, message in (
        ('heads', 3, 'not divisible by text.num_heads'),
        ('context_length', 7, 'context_length is 7, but the arrays have 6'),
        ('qk_norm', True, 'qk_norm of text_cfg is True, which is not supported'),
        ('hf_model_name', 'roberta-base', "is 'roberta-base', which is not supported"),
    ):
        changed = json.loads(config.read_text())
        changed['model_cfg']['text_cfg'][key] = value
        (tmp_path / 'other').mkdir(exist_ok=True)
        (tmp_path / 'other' / config.name).write_text(json.dumps(changed))
        save_file(of_open_clip(module, prefix), tmp_path / 'other' / 'open_clip_model.safetensors')
        with pytest.raises(UserError, match=message):
            vit_jax.load(tmp_path / 'other')


def test_fields_of_both_towers_and_of_the_text_tower(tmp_path):
    made('clip', tmp_path)
    model, _ = vit_jax.load(tmp_path, dtype='bfloat16', epsilon=1e-3, text=dict(pool='first'))
    assert model.image.dtype == model.text.dtype == 'bfloat16' and model.text.pool == 'first'
    assert model.image.epsilon == 1e-3 and model.text.epsilon == 1e-5
    with pytest.raises(UserError, match="text has no key 'pol'; the nearest is 'pool'"):
        vit_jax.load(tmp_path, text=dict(pol='first'))
    with pytest.raises(UserError, match="two towers, which take no other head; part='image'"):
        vit_jax.load(tmp_path, num_classes=3)
    words, params = vit_jax.load(tmp_path, part='text', num_classes=3, pool='mean')
    assert words.pool == 'mean' and params['head']['kernel'].shape == (16, 3)
    images = vit_jax.preprocess(str(tmp_path), np.zeros((20, 20, 3), np.uint8))
    assert images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize('changes, words', [
    (dict(text_config=NARROW | dict(vocab_size=33)), 'vocab_size is 33, but the arrays have 32'),
    (dict(text_config=NARROW | dict(eos_token_id=40)), 'eos_token_id of the text tower is 40'),
    (dict(text_config=NARROW | dict(hidden_act='relu')), "hidden_act 'relu' is none of"),
    (dict(model_type='altclip'), "give part='image'"),
])  # fmt: skip
def test_a_config_that_contradicts_a_text_tower_is_refused(changes, words, tmp_path):
    made('clip', tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=words):
        vit_jax.load(tmp_path)


def test_what_a_format_cannot_express_is_named(tmp_path):
    made('clip', tmp_path / 'a')
    model, params = vit_jax.load(tmp_path / 'a')
    biased = model.clone(use_bias=True), params | {'bias': np.zeros((), np.float32)}
    ended = model.clone(text=model.text.clone(eos_id=2)), params
    padded = model.clone(text=model.text.clone(mask_padding=True)), params
    for (towers, weights), format, message in (
        ((model, params), 'timm', 'format timm has no two towers; hf and big_vision have'),
        ((model, params), 'big_vision', "cannot express"),
        (biased, 'hf', 'has these towers as CLIPModel, which has no bias of the logits'),
        (ended, 'hf', 'which has no end token 2'),
        (padded, 'hf', 'cannot express text.mask_padding=True of this model, only False'),
        ((model, {**params, 'text': {}}), 'hf', r'parameter text/.* is absent in params'),
    ):
        with pytest.raises(UserError, match=message):
            path = tmp_path / ('b.npz' if format == 'big_vision' else 'b')
            vit_jax.save(path, towers, weights, format)
    assert not (tmp_path / 'b').exists()


def run_of(folder, tokenizer, **changes):
    """The config of a run of one step on three images with captions."""
    rows = []
    for i, caption in enumerate(('a dog', 'the red cat', 'a blue shoe')):
        (folder / 'data').mkdir(parents=True, exist_ok=True)
        (folder / 'data' / f'{i}.png').write_bytes(kinds.png(i))
        rows.append(json.dumps(dict(file_name=f'{i}.png', text=caption)))
    (folder / 'data' / 'captions.jsonl').write_text('\n'.join(rows))
    small = dict(width=16, depth=1, num_heads=2, mlp_dim=16)
    data = dict(source=dict(name=str(folder / 'data')), tokenizer=str(tokenizer), batch_size=8)
    return dict(
        model=dict(name='vit/4', num_classes=8, pool='map', **small), steps=1, data=data | dict(
            task='image_text', image_size=8, view='resize', length=6,
        ), objective=dict(name='contrastive', text=dict(pool='mean', **small)),
        optim=dict(lr=1e-3), checkpoint=dict(every=1), **changes,
    )  # fmt: skip


def stored(folder, given, params, monkeypatch):
    """Makes a folder that of a run with this config and these parameters."""
    (folder / 'checkpoints').mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(given))
    arrays = {n: np.asarray(x) for n, x in named_leaves(params).items()}
    monkeypatch.setattr(run, 'arrays_of', lambda address, ema, values: arrays)


def test_a_run_of_two_towers_is_loaded_and_written(tmp_path, monkeypatch):
    full = config.complete(run_of(tmp_path, words.clip(tmp_path / 'tokens')))
    parts = assembly.make(full, devices=jax.devices()[:1])
    trained = jax.jit(parts.objective.init)(jax.random.key(1))
    stored(tmp_path / 'run', full.to_dict(), trained, monkeypatch)
    model, params = vit_jax.load(tmp_path / 'run')
    assert isinstance(model, TwoTowers) and model.text.pool == 'mean' and model.text.length == 6
    batch = next(pipeline.batches(parts.source, parts.task, 0, batch_size=3))
    found = ours(model, params, model.normalise(batch['image']), batch['text'])
    wanted = jax.jit(parts.objective.predict)(trained, batch)
    for name in ('image_embedding', 'text_embedding'):
        assert_close(found[name], np.asarray(wanted[name]), atol=1e-5)
    for part in ('image', 'text'):
        alone = vit_jax.load(tmp_path / 'run', part=part)[1]
        jax.tree.map(np.testing.assert_array_equal, alone, params[part])
    vit_jax.save(tmp_path / 'a.npz', model, params, 'big_vision')
    back, again = vit_jax.load(tmp_path / 'a.npz')
    assert back == model and back.text.pool == 'mean'
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize('prefix', ['', 'text/'])
def test_a_run_of_texts_alone_is_their_tower(prefix, tmp_path, monkeypatch):
    """Text classification, and masked words, which has a head of its own."""
    model = models.build('text', num_classes=3, vocab_size=9, length=4, width=8, depth=1,
                         num_heads=1, mlp_dim=8)  # fmt: skip
    params = model.init(jax.random.key(0), np.zeros((1, 4), int))['params']
    kept = {n: x for n, x in params.items() if not prefix or n != 'head'}
    trained = dict(text=kept, vocabulary_bias=np.zeros(9, np.float32)) if prefix else kept
    given = dict(model=models.describe(model) | dict(num_classes=None),
                 objective=dict(name='mlm' if prefix else 'supervised'), data=dict(length=4))
    stored(tmp_path / 'run', given, trained, monkeypatch)
    for part in (None, 'encoder', 'text'):
        found, weights = vit_jax.load(tmp_path / 'run', part=part)
        wanted = model.clone(num_classes=None) if prefix else model
        assert found == interface.exact(wanted)
        jax.tree.map(np.testing.assert_array_equal, weights, kept)


@pytest.mark.parametrize('name, config', [
    ('CLIPTextModelWithProjection', NARROW | dict(projection_dim=10)),
    ('CLIPTextModel', NARROW | dict(eos_token_id=2)), ('SiglipTextModel', NARROW),
])  # fmt: skip
def test_a_text_tower_alone(name, config, tmp_path):
    transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
    kind = getattr(transformers, name)
    module = randomised(kind(kind.config_class(**config)))
    module.save_pretrained(tmp_path)
    with torch.no_grad():
        out = module(input_ids=torch.from_numpy(TOKENS))
    for part in (None, 'text'):
        model, params = vit_jax.load(tmp_path, part=part)
        found, inside = jax.jit(lambda p: model.apply({'params': p}, TOKENS))(params)  # noqa: B023
        wanted = out['text_embeds' if 'text_embeds' in out else 'pooler_output'].numpy()
        assert_close(np.asarray(found), wanted)
        assert_close(np.asarray(inside['encoded']), out.last_hidden_state.numpy())
    assert set(done(load.read(tmp_path).account)) == {'loaded'}
    vit_jax.save(tmp_path / 'again', model, params, 'hf')
    written, own = (
        {n.removeprefix('text_model.'): x for n, x in load_file(p / 'model.safetensors').items()}
        for p in (tmp_path / 'again', tmp_path)
    )
    assert written.keys() == own.keys()
    for key, x in own.items():
        np.testing.assert_array_equal(written[key], x, key)
    again = kind.from_pretrained(tmp_path / 'again')
    assert json.loads((tmp_path / 'again/config.json').read_text())['architectures'] == [name]
    with torch.no_grad():
        same = again(input_ids=torch.from_numpy(TOKENS)).last_hidden_state
    assert_close(same.numpy(), out.last_hidden_state.numpy())


def test_a_tokenizer_is_written_beside_two_towers(tmp_path):
    """For transformers' AutoTokenizer; a model of another kind or format has no place for it."""
    transformers = pytest.importorskip('transformers')
    made('clip', tmp_path / 'clip')
    words.clip(tmp_path / 'tokens', length=6)
    tokenizer = vit_jax.tokenizer(tmp_path / 'tokens')
    model, params = vit_jax.load(tmp_path / 'clip')
    for _ in range(2):  # it is replaced
        vit_jax.save(tmp_path / 'out', model, params, 'hf', tokenizer=tokenizer)
    texts = ['a red dog', "It's <b>café</b>"]
    wanted = tokenizer(texts)
    np.testing.assert_array_equal(vit_jax.tokenizer(tmp_path / 'out')(texts), wanted)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    ids = theirs(texts, padding='max_length', max_length=6, truncation=True)['input_ids']
    np.testing.assert_array_equal(ids, wanted)
    assert isinstance(transformers.AutoModel.from_pretrained(tmp_path / 'out').logit_scale.item(),
                      float)  # fmt: skip
    image = vit_jax.load(tmp_path / 'clip', part='image')
    for one, format in (((model, params), 'big_vision'), (image, 'hf')):
        with pytest.raises(UserError, match='tokenizer is written beside two towers or'):
            vit_jax.save(tmp_path / 'x.npz', *one, format, tokenizer=tokenizer)
