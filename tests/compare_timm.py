"""Compares timm's models with what vit_jax makes of their files.

    python tests/compare_timm.py [PART ...] [--module MODULE ...]

Every architecture of timm's families that this package reads is made small (two blocks, other
sizes kept in proportion), gets random weights, is saved by timm, loaded by vit_jax and compared at
its own and at another image size, in float32: logits, the input of the head and the patches'
features. What vit_jax saves of it again must have the same arrays, and timm must build a model of
it with the same outputs. Prints a line for each architecture and a summary by family. PART limits
it to names that contain one of the texts, --module to modules of timm.models.

    python tests/compare_timm.py --record FOLDER NAME [--label LABEL] [--by_name] [--changes JSON]

keeps the file of one architecture, made tiny, in float16, and what timm returns, in the layout of
tests/data. JSON has arguments of the class. With --by_name its weights are those of noise.py, and
only their shapes are kept.

Not a test, as it takes minutes and needs timm, which needs torchvision.
"""

import argparse
import contextlib
import functools
import io
import json
import pathlib
import sys
import tempfile
import warnings
from unittest import mock

import jax
import noise
import numpy as np
import timm
import torch
import verdicts
from safetensors.torch import load_file, save_file

import vit_jax
from vit_jax.errors import UserError

MODULES = (
    'vision_transformer', 'deit', 'beit', 'eva', 'vision_transformer_relpos',
    'vision_transformer_hybrid', 'naflexvit', 'mlp_mixer', 'resnetv2',
)  # fmt: skip
CLASSES = 7


def entry(name):
    """(module of timm, {argument: value}) that timm makes an architecture of."""
    caught = {}

    class Caught(Exception):
        pass

    def build(kind, variant, pretrained, **kwargs):
        caught.update(kwargs)
        raise Caught

    function = timm.model_entrypoint(name)
    modules = [sys.modules[function.__module__], timm.models.vision_transformer]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, 'build_model_with_cfg', build))
        stack.enter_context(contextlib.suppress(Caught))
        function()
    return function.__module__.split('.')[-1], caught


def small(name, module, args, width=16):
    """Arguments of a small model of the architecture: two blocks, few heads of `width` channels."""
    if module == 'resnetv2':
        factor = args.get('width_factor')
        if not factor:
            return dict(num_classes=CLASSES)
        root = 32 if factor == 3 else 32 // factor
        stages = (4 * root, 8 * root) if args['layers'] == [3, 4, 6, 3] else (4 * root,)
        return dict(num_classes=CLASSES, stem_chs=root, channels=stages)
    if module == 'mlp_mixer':
        return dict(img_size=4 * args['patch_size'], num_classes=CLASSES)  # it allows no others
    if module == 'naflexvit':
        return dict(
            depth=2, embed_dim=4 * width, num_heads=4, num_classes=CLASSES,
            pos_embed_grid_size=(4, 4),
        )  # fmt: skip
    if name == 'vit_base_mci_224':  # the stem fixes the width
        return dict(depth=2, num_classes=CLASSES)
    heads = min(args.get('num_heads', 12), 4)
    patch = args.get('patch_size', 16)
    sizes = dict(embed_dim=heads * width, num_heads=heads, depth=2, num_classes=CLASSES)
    if module == 'vision_transformer_hybrid':
        return sizes | dict(img_size=128)
    if args.get('num_kv_heads') is not None:
        sizes['num_kv_heads'] = (heads, heads // 2)
    if args.get('rel_pos_dim'):
        sizes['rel_pos_dim'] = 24
    if isinstance(args.get('mlp_layer'), functools.partial):  # SwiGLUPacked: an even hidden size
        sizes['mlp_ratio'] = 5.5
    if args.get('ref_feat_shape') is not None:
        sizes['ref_feat_shape'] = (5, 5)
    return sizes | dict(img_size=patch * 4)


def randomised(module, seed):
    """The module with random weights, so that no array is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = 0.5 if p.ndim > 1 and 'norm' not in key else 0.3
            if p.ndim > 1 and 'embed' not in key and 'token' not in key and 'latent' not in key:
                scale = 1.5 / p[0].numel() ** 0.5
            norm = p.ndim == 1 and key.endswith(('norm.weight', 'norm1.weight', 'norm2.weight'))
            p.copy_(noise * scale + (1.0 if norm else 0.0))
    return module.eval()


def made(name, args, seed, half=False):
    """The architecture with random weights; with `half`, weights that float16 can express."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter('ignore')
        module = randomised(timm.create_model(name, **args), seed)
    if half:  # tables that are no weights keep their precision
        state = module.state_dict()
        module.load_state_dict({k: v.half() if v.is_floating_point() else v
                                for k, v in state.items()})  # fmt: skip
    return module


def outputs(module, images):
    """{name: array} that timm makes of images [B, H, W, C]."""
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if hasattr(module, 'embeds'):  # NaFlexVit pads and masks unless it gets one size
            features = module.forward_features(x)
            features = features['patches'] if isinstance(features, dict) else features
        else:
            features = module.forward_features(x)
        logits = module(x)
        pooled = module.forward_head(features, pre_logits=True)
    arrays = dict(logits=logits.numpy(), pre_logits=pooled.numpy())
    if hasattr(module, 'head_dist'):  # the mean of both tokens, where each head reads one
        arrays.pop('pre_logits')
    if features.ndim == 3:
        before = getattr(module, 'num_prefix_tokens', 0)
        arrays['encoded'] = features[:, before:].numpy()
    return arrays


def difference(folder, images, theirs, **options):
    """Largest difference of what vit_jax makes of images from {name: array}."""
    model, params = vit_jax.load(folder, **options)
    return of_model(model, params, images, theirs)


def of_model(model, params, images, theirs):
    """Largest difference of what a model of vit_jax makes of images from {name: array}.

    Of arrays with values above 1 it is relative to the largest.
    """
    apply = jax.jit(
        lambda p, x: model.apply({'params': p}, x),
        compiler_options={'xla_backend_optimization_level': 0},  # compiles in half the time
    )
    _, out = apply(params, images)
    out = {k: v for k, v in out.items() if k in theirs}
    assert theirs.keys() <= out.keys() | {'encoded'}, sorted(out)
    return verdicts.largest(
        float(np.abs(np.asarray(v) - theirs[k]).max() / max(1, np.abs(theirs[k]).max()))
        for k, v in out.items()
    )


def image_size(module):
    """(height, width) of the images that a model is for."""
    if hasattr(module, 'embeds'):
        grid, patch = module.embeds.pos_embed_grid_size, module.embeds.patch_size
        return grid[0] * patch[0], grid[1] * patch[1]
    patches = getattr(module, 'patch_embed', None) or getattr(module, 'stem', None)
    return getattr(patches, 'img_size', None) or (64, 64)


def saved_back(folder, images):
    """Why vit_jax does not save as timm what it loads; None if timm loads it, to the same."""
    model, params = vit_jax.load(folder)
    try:
        vit_jax.save(folder / 'out', model, params, 'timm', image_size=images.shape[1:3])
    except UserError as e:
        return str(e)
    theirs, ours = (load_file(path / 'model.safetensors') for path in (folder, folder / 'out'))
    if theirs.keys() != ours.keys() or not all(ours[k].equal(theirs[k]) for k in ours):
        return f'other arrays: {sorted(theirs.keys() ^ ours.keys())[:4]}'
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter('ignore')
        module = timm.create_model(f'local-dir:{folder / "out"}', pretrained=True).eval()
    value = of_model(model, params, images, outputs(module, images))
    return None if value < verdicts.TOLERANCE else f'saved as another model: {value:.1e}'


def saved(module, name, args, folder):
    """Writes the files that timm's push_to_hf_hub would."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        timm.models.save_for_hf(module, folder, model_args=args, safe_serialization=True)
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == name, config['architecture']


def compare(name, folder, seed, notes):
    """Largest difference; appends to `notes` why it was not saved back."""
    family, given = entry(name)
    args = small(name, family, given)
    module = made(name, args, seed)
    saved(module, name, args, folder)
    generator = np.random.default_rng(seed)
    size = image_size(module)
    images = generator.normal(size=(2, *size, 3)).astype(np.float32)
    found = []
    with jax.default_matmul_precision('highest'):
        options = dict(image_size=size) if family == 'naflexvit' else {}
        found.append(difference(folder, images, outputs(module, images), **options))
        back = None if options else saved_back(folder, images)
        notes += [f'not saved: {back[:120]}'] if back else []
        step = getattr(getattr(module, 'patch_embed', None), 'patch_size', (16, 16))
        other = size[0] + 2 * step[0], size[1] + step[1]
        if family in ('vision_transformer_hybrid', 'resnetv2', 'naflexvit'):
            other = size[0] + 32, size[1] + 64
        images = generator.normal(size=(2, *other, 3)).astype(np.float32)
        if family in ('mlp_mixer',):
            return found[0]
        resized = module
        if family not in ('resnetv2', 'naflexvit'):
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter('ignore')
                resized = timm.create_model(f'local-dir:{folder}', pretrained=True, img_size=other)
        options = {} if family == 'resnetv2' else dict(image_size=other)
        found.append(difference(folder, images, outputs(resized.eval(), images), **options))
    return verdicts.largest(found)


def record(name, folder, seed, label, by_name, **changes):
    """Writes tests/data's LABEL/ and LABEL.expected.npz of a tiny model in float16.

    With `by_name` its weights are those of noise.py, and only their shapes are written.
    """
    family, given = entry(name)
    args = small(name, family, given)
    if 'img_size' in args and 'embed_dim' in args:
        args |= dict(embed_dim=16, num_heads=2, mlp_ratio=1.5, patch_size=2, img_size=8)
    args |= changes
    module = made(name, args, seed, half=True)
    target = folder / label
    if by_name:
        shapes = {k: list(v.shape) for k, v in module.state_dict().items()}
        arrays = {k: torch.from_numpy(noise.values(k, v)) for k, v in shapes.items()}
        module.load_state_dict(arrays)
        saved(module, name, args, target)
        (target / 'model.safetensors').unlink()
        (target / 'arrays.json').write_text(json.dumps(shapes, indent=0) + '\n')
    else:
        target.mkdir(parents=True, exist_ok=True)
        saved(module, name, args, target)
    size = image_size(module)
    channels = args.get('in_chans', 3)
    if family == 'naflexvit':  # its tables fit other images than it was evaluated on
        config = json.loads((target / 'config.json').read_text())
        config['pretrained_cfg']['input_size'] = [channels, *size]
        (target / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    expected = {}
    sizes = {'': size}
    if family in ('naflexvit', 'resnetv2'):  # which take images of any size
        sizes['_resized'] = size[0] // 2, size[1] + size[1] // 4
    elif family not in ('mlp_mixer', 'vision_transformer_hybrid'):
        sizes['_resized'] = size[0] * 3 // 2, size[1] * 5 // 4
    for suffix, one in sizes.items():
        images = np.random.default_rng(seed).normal(size=(1, *one, channels)).astype(np.float16)
        images = images.astype(np.float32)
        if suffix and family not in ('naflexvit', 'resnetv2'):
            module = timm.create_model(f'local-dir:{target}', pretrained=True, img_size=one).eval()
        theirs = outputs(module, images) | {'images': images}
        theirs.pop('encoded', None)
        expected |= {f'{key}{suffix}': value for key, value in theirs.items()}
    np.savez_compressed(folder / f'{label}.expected.npz', **expected)
    if not by_name:
        arrays = load_file(target / 'model.safetensors')  # which timm would resize in float16
        save_file({k: v.half() for k, v in arrays.items()}, target / 'model.safetensors',
                  metadata={'format': 'pt'})  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('parts', nargs='*')
    parser.add_argument('--module', nargs='+', default=MODULES, choices=MODULES)
    parser.add_argument('--record', type=pathlib.Path)
    parser.add_argument('--label')
    parser.add_argument('--by_name', action='store_true', help='record shapes of weights alone')
    parser.add_argument('--changes', type=json.loads, default={}, help='arguments to record with')
    options = parser.parse_args()
    names = [n for m in options.module for n in timm.list_models(module=m)]
    names = [n for n in names if not options.parts or any(p in n for p in options.parts)]
    if options.record:
        for name in names if options.label is None else names[:1]:
            label = options.label or f'timm_{name}'
            record(name, options.record, 0, label, options.by_name, **options.changes)
        return
    summary = verdicts.Summary()
    for i, name in enumerate(names):
        with tempfile.TemporaryDirectory() as folder:
            family = entry(name)[0]
            notes = []
            verdict, value, text = verdicts.judge(
                functools.partial(compare, name, pathlib.Path(folder), i, notes), folder
            )
        summary.add(family, verdict, value)
        print(f'{name:45} {verdict:8} {", ".join([text, *notes])}', flush=True)
    summary.show()


if __name__ == '__main__':
    main()
