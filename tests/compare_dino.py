"""Trains a tiny DINO beside the authors' code, step by step, and prints where they differ.

    git clone https://github.com/facebookresearch/dino /tmp/dino
    python tests/compare_dino.py /tmp/dino

Both begin from the same parameters and see the same crops. Model, head, loss, clipping, frozen last
layer, AdamW and schedules are the authors'; the learning rate, whose warm-up differs by a step, is
that of tests/tiny_dino.py, the stochastic depth is off. Not a test, as it needs that repository.
"""

import pathlib
import sys
import tempfile
import types

import jax
import launched
import numpy as np
import tiny_dino
import torch

from vit_jax import assembly, config, sharding, step
from vit_jax.data import pipeline
from vit_jax.models.parameters import named_leaves

STEPS, PER_EPOCH, HELD = 24, 4, 6  # as in tests/tiny_dino.py


def authors(folder):
    """The authors' modules main_dino, utils and vision_transformer."""
    stub = types.ModuleType('torchvision')
    stub.datasets = stub.transforms = stub.models = types.ModuleType('stub')
    sys.modules['torchvision'] = stub
    sys.path.insert(0, folder)
    import main_dino
    import utils
    import vision_transformer

    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    return main_dino, utils, vision_transformer


def network(utils, transformers, scaled):
    """Their backbone and head at the size of tests/tiny_dino.py."""
    backbone = transformers.VisionTransformer(
        img_size=[16], patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, qkv_bias=True,
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
    )  # fmt: skip
    head = transformers.DINOHead(
        16, 64, norm_last_layer=not scaled, hidden_dim=16, bottleneck_dim=8
    )
    return utils.MultiCropWrapper(backbone, head)


def as_theirs(params):
    """Parameters by the names, and in the layout, of the authors' network."""
    ours = {k: np.asarray(v) for k, v in named_leaves(jax.device_get(params)).items()}
    scale = ours.get('head/prototypes/scale', np.ones(64, 'f'))
    found = {
        'backbone.cls_token': ours['vit/cls'], 'backbone.pos_embed': ours['vit/posemb'],
        'backbone.patch_embed.proj.weight': ours['vit/embedding/kernel'].transpose(3, 2, 0, 1),
        'backbone.patch_embed.proj.bias': ours['vit/embedding/bias'],
        'backbone.norm.weight': ours['vit/norm/scale'], 'backbone.norm.bias': ours['vit/norm/bias'],
        'head.last_layer.weight_v': ours['head/prototypes/direction'].T,
        'head.last_layer.weight_g': scale[:, None],
    }  # fmt: skip
    for place, name in ((0, 'fc1'), (2, 'fc2'), (4, 'fc3')):
        found[f'head.mlp.{place}.weight'] = ours[f'head/{name}/kernel'].T
        found[f'head.mlp.{place}.bias'] = ours[f'head/{name}/bias']
    names = {'attn.qkv': 'attn/qkv', 'attn.proj': 'attn/out', 'mlp.fc1': 'mlp/fc1',
             'mlp.fc2': 'mlp/fc2'}  # fmt: skip
    for i in range(2):
        block = {k.removeprefix('vit/encoder/'): v[i] for k, v in ours.items() if 'encoder/' in k}
        for theirs, name in names.items():
            bias, kernel = block[f'{name}/bias'].ravel(), block[f'{name}/kernel']
            found[f'backbone.blocks.{i}.{theirs}.weight'] = kernel.reshape(-1, bias.size).T
            found[f'backbone.blocks.{i}.{theirs}.bias'] = bias
        for name in ('norm1', 'norm2'):
            found[f'backbone.blocks.{i}.{name}.weight'] = block[f'{name}/scale']
            found[f'backbone.blocks.{i}.{name}.bias'] = block[f'{name}/bias']
    return {name: torch.tensor(np.ascontiguousarray(x)) for name, x in found.items()}


def crops_of(batch):
    """The normalised crops [B, C, H, W], one tensor a crop, of a batch."""
    views = [batch[kind][:, i] for kind in ('global', 'local') for i in range(batch[kind].shape[1])]
    return [torch.tensor(x.transpose(0, 3, 1, 2)) / 255 * 2 - 1 for x in views]


def compare(modules, folder, scaled):
    """Prints the largest differences after some of the steps."""
    main_dino, utils, transformers = modules
    changes = [('model.drop_path', '0.0'), ('objective.scaled', str(scaled))]
    full = config.override(tiny_dino.get_config(str(folder)).to_dict(), changes)
    parts = assembly.make(full, devices=jax.devices()[:1])
    advance = step.compiled(parts.objective, parts.tx, parts.abstract, parts.mesh, seed=full.seed)
    state = step.init(parts.objective, parts.tx, full.seed, parts.abstract)
    feed = pipeline.batches(parts.source, parts.task, full.seed, batch_size=8)
    first = as_theirs(state.params)

    student, teacher = (network(utils, transformers, s) for s in (scaled, False))
    for one in (student, teacher):
        one.load_state_dict(first)
    for p in teacher.parameters():
        p.requires_grad = False
    criterion = main_dino.DINOLoss(64, 5, 0.04, 0.07, 3, STEPS // PER_EPOCH)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    decay, momentum = (utils.cosine_scheduler(*ends, STEPS, 1) for ends in ((0.04, 0.4), (0.9, 1)))
    for n in range(STEPS):
        batch = next(feed)
        for i, group in enumerate(optimizer.param_groups):
            group['lr'] = float(parts.tx.schedule(n))
            group['weight_decay'] = 0.0 if i else decay[n]
        crops = crops_of(batch)
        loss = criterion(student(crops), teacher(crops[:2]), n // PER_EPOCH)
        optimizer.zero_grad()
        loss.backward()
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(n // HELD, student, 1)
        optimizer.step()
        with torch.no_grad():
            for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
                old.mul_(momentum[n]).add_((1 - momentum[n]) * new)
        state, metrics = advance(state, sharding.put(batch, parts.mesh), {})
        if n in (0, 1, 3, 7, 15, 23):
            gaps = [
                max(float((x - own[name]).abs().max()) for name, x in as_theirs(tree).items())
                for tree, own in ((state.params, student.state_dict()),
                                  (state.extra['average'], teacher.state_dict()))
            ]  # fmt: skip
            center = torch.tensor(np.asarray(state.extra['center']))
            gaps.append(float((center - criterion.center[0]).abs().max()))
            print(f'step {n + 1}: loss {float(loss):.6f}, {float(metrics["loss"]):.6f} here; '
                  'student, teacher and centre differ by up to '
                  + ', '.join(f'{gap:.1e}' for gap in gaps))  # fmt: skip
    moved = max(float((x - first[n]).abs().max()) for n, x in student.state_dict().items())
    print(f'the student has moved by up to {moved:.3f}')


def main():
    modules = authors(sys.argv[1])
    with tempfile.TemporaryDirectory() as path:
        folder = launched.write_images(pathlib.Path(path) / 'images', {'train': 8, 'val': 4})
        for scaled in (True, False):
            print(f'norm_last_layer {not scaled}')
            compare(modules, folder, scaled)


if __name__ == '__main__':
    main()
