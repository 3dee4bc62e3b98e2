"""Compares OpenCLIP's image towers, and both towers, with what vit_jax makes of their files.

    python tests/compare_open_clip.py [PART ...]

Each configuration of OpenCLIP whose tower is a ViT, its own or one of timm, is made small, gets
random weights, is saved as push_to_hf_hub would, loaded by vit_jax and compared at its own and at
another image size, in float32; with --both, whole models with a text tower of OpenCLIP's own, by
embeddings and logits. PART limits it to names that contain one of the texts. With --record FOLDER,
keeps a tiny file and what OpenCLIP returns, as in tests/data.

Not a test, as it needs open_clip, timm and torchvision.
"""

import argparse
import contextlib
import functools
import inspect
import json
import pathlib
import tempfile
from unittest import mock

import compare_timm
import jax
import numpy as np
import open_clip
import timm
import torch
import verdicts
from open_clip.model import CLIP, CustomTextCLIP, _build_vision_tower
from safetensors.torch import save_file

import vit_jax
from vit_jax.convert.timm import arguments

CLASSES, WORDS = 7, 101


def small(config, width=16):
    """model_cfg of a small model, and arguments of its trunk if that is one of timm."""
    config = json.loads(json.dumps(config)) | dict(embed_dim=CLASSES)
    vision = config['vision_cfg']
    vision['attn_pooler_heads'] = 1
    if 'timm_model_name' not in vision:
        patch = vision.get('patch_size', 16)
        sizes = dict(layers=2, width=2 * width, head_width=width, image_size=4 * patch)
        vision.update(sizes)
        return config, None
    name = vision['timm_model_name']
    family, given = compare_timm.entry(name)
    args = compare_timm.small(name, family, given, width)
    args.pop('num_classes')
    vision['image_size'] = args.get('img_size', vision.get('image_size', 224))
    return config, args


@contextlib.contextmanager
def small_architecture(name, args):
    """timm, and vit_jax's table of its architectures, have a small one of this name."""
    if args is None:
        yield
        return
    create = timm.create_model
    made = mock.patch.object(timm, 'create_model', lambda n, **given: create(n, **given, **args))
    tables = [arguments.read_table(path.name)['architectures'] for path in
              pathlib.Path(arguments.__file__).parent.glob('*.json')]  # fmt: skip
    known = [table for table in tables if name in table]
    with made, contextlib.ExitStack() as stack:
        for table in known:
            as_json = json.loads(json.dumps(args))
            stack.enter_context(mock.patch.dict(table, {name: table[name] | as_json}))
        yield


def saved(tower, config, folder, half=False):
    """Writes the tower, and some arrays beside it, as OpenCLIP names them."""
    arrays = {f'visual.{n}': a.contiguous() for n, a in tower.state_dict().items()}
    text = {'logit_scale': torch.ones(()), 'token_embedding.weight': torch.ones(3, 4)}
    arrays = {n: a.half() if half else a for n, a in (arrays | text).items()}
    write(arrays, config, folder)


def write(arrays, config, folder):
    """Writes arrays and model_cfg as push_to_hf_hub does."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: array.contiguous() for name, array in arrays.items()}
    save_file(arrays, folder / 'open_clip_model.safetensors', metadata={'format': 'pt'})
    squash = dict(interpolation='bicubic', resize_mode='squash')
    document = dict(model_cfg=config, preprocess_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3) | squash)
    (folder / 'open_clip_config.json').write_text(json.dumps(document, indent=1))


def built(config, seed, half=False):
    """OpenCLIP's image tower of model_cfg with random weights."""
    quick = config.get('quick_gelu', False)
    tower = _build_vision_tower(config['embed_dim'], config['vision_cfg'], quick)
    tower = compare_timm.randomised(tower, seed)
    return tower.half().float() if half else tower


def outputs(tower, images):
    with torch.no_grad():
        out = tower(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return (out[0] if isinstance(out, tuple) else out).numpy()  # CoCa's gives tokens, too


def difference(folder, images, theirs, **options):
    model, params = vit_jax.load(folder, part='image', **options)
    ours, _ = jax.jit(lambda p, x: model.apply({'params': p}, x))(params, images)
    return float(np.abs(np.asarray(ours) - theirs).max())


def compare(name, config, folder, seed):
    """Largest difference at both sizes."""
    config, args = small(config)
    vision = config['vision_cfg']
    generator = np.random.default_rng(seed)
    size = vision['image_size']
    with small_architecture(vision.get('timm_model_name'), args):
        tower = built(config, seed)
        saved(tower, config, folder)
        images = generator.normal(size=(2, size, size, 3)).astype(np.float32)
        found = [difference(folder, images, outputs(tower, images))]
        if args is None:
            other = size + 2 * vision.get('patch_size', 16)
            larger = built(config | dict(vision_cfg=vision | dict(image_size=other)), seed)
            state = {f'visual.{n}': a for n, a in tower.state_dict().items()}
            model = mock.Mock(visual=larger)
            open_clip.model.resize_pos_embed(state, model)
            larger.load_state_dict({n.removeprefix('visual.'): a for n, a in state.items()})
            images = generator.normal(size=(2, other, other, 3)).astype(np.float32)
            found.append(difference(folder, images, outputs(larger, images), image_size=other))
    return verdicts.largest(found)


def whole(name, config, folder, seed):
    """Largest difference of embeddings and logits of both towers."""
    config, args = small(config)
    text, generator = config['text_cfg'], np.random.default_rng(seed)
    if args and config['vision_cfg'].get('timm_proj') in ('', 'none', None):
        config['embed_dim'] = args['embed_dim']
    width = config['embed_dim'] if text.get('proj_type') == 'none' else 32
    text.update(width=width, heads=width // 8, layers=2, vocab_size=WORDS)
    kind = CustomTextCLIP if config.get('custom_text') else CLIP
    known = inspect.signature(kind).parameters
    with small_architecture(config['vision_cfg'].get('timm_model_name'), args):
        model = kind(**{key: value for key, value in config.items() if key in known})
        model = compare_timm.randomised(model, seed)
        write(model.state_dict(), config, folder)
        size = config['vision_cfg'].get('image_size', 224)
        images = generator.normal(size=(3, size, size, 3)).astype(np.float32)
        tokens = generator.integers(0, WORDS, (3, text.get('context_length', 77)))
        with torch.no_grad():
            x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            theirs = [model.encode_image(x, normalize=True),
                      model.encode_text(torch.from_numpy(tokens), normalize=True)]  # fmt: skip
            logits = model.logit_scale.exp() * theirs[0] @ theirs[1].T
            theirs.append(logits if model.logit_bias is None else logits + model.logit_bias)
        towers, params = vit_jax.load(folder)
    logits, out = jax.jit(lambda p: towers.apply({'params': p}, images, tokens))(params)
    ours = out['image_embedding'], out['text_embedding'], logits
    return verdicts.largest([
        float(np.abs(np.asarray(a) - b.numpy()).max()) for a, b in zip(ours, theirs, strict=True)
    ])  # fmt: skip


def record(folder, seed=0):
    """Writes tests/data's open_clip/ and open_clip_timm/ with what OpenCLIP returns."""
    own = dict(layers=2, width=8, head_width=4, patch_size=4, image_size=16, mlp_ratio=2.0)
    trunk = dict(timm_model_name='vit_base_patch16_siglip_224', timm_pool='map',
                 timm_proj='linear', image_size=16)  # fmt: skip
    small_trunk = dict(
        img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.0
    )
    for label, vision, args in (
        ('open_clip', own, None), ('open_clip_timm', trunk, small_trunk),
    ):
        config = dict(embed_dim=CLASSES, quick_gelu=args is None, vision_cfg=vision,
                      text_cfg=dict(width=8, heads=1, layers=1))  # fmt: skip
        with small_architecture(vision.get('timm_model_name'), args):
            tower = built(config, seed, half=True)
        saved(tower, config, folder / label, half=True)
        images = np.random.default_rng(seed).normal(size=(1, 16, 16, 3)).astype(np.float16)
        images = images.astype(np.float32)
        np.savez_compressed(folder / f'{label}.results.npz', images=images,
                            logits=outputs(tower, images))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('parts', nargs='*')
    parser.add_argument('--record', type=pathlib.Path)
    parser.add_argument('--both', action='store_true')
    options = parser.parse_args()
    if options.record:
        record(options.record)
        return
    summary = verdicts.Summary()
    for i, name in enumerate(open_clip.list_models()):
        config = open_clip.get_model_config(name)
        vision = config['vision_cfg']
        trunk = vision.get('timm_model_name')
        vit = compare_timm.entry(trunk)[0] in compare_timm.MODULES if trunk else not isinstance(
            vision.get('layers', 12), list
        )  # fmt: skip
        if not vit or (options.parts and not any(p in name for p in options.parts)):
            continue
        if options.both and ('hf_model_name' in config['text_cfg'] or 'coca' in name):
            continue
        with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision('highest'):
            verdict, value, text = verdicts.judge(
                functools.partial(
                    whole if options.both else compare, name, config, pathlib.Path(folder), i
                ), folder,
            )  # fmt: skip
        summary.add('a trunk of timm' if trunk else "OpenCLIP's own ViT", verdict, value)
        print(f'{name:40} {verdict:8} {text}', flush=True)
    summary.show()


if __name__ == '__main__':
    main()
