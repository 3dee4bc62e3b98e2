"""The experiments as the tests take them: by name and argument, and at a toy size."""

import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import scenes
import words
from PIL import Image

import vit_jax
from vit_jax import models

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
PUBLISHED = (  # whose numbers others have published
    'pretrain', 'posemb', 'augreg', 'vit_s16_i1k', 'mixer_i1k', 'finetune', 'finetune_augreg',
    'finetune_readme', 'transfer', 'mae', 'finetune_mae', 'mae_probe', 'dino', 'dino_probe',
    'aim', 'deit', 'deit3', 'dinov2_ade20k', 'segmenter', 'yolos', 'eomt', 'siglip', 'lit', 'clip',
)  # fmt: skip
OWN = ('study', 'augreg_fashion', 'ssl_study')  # whose numbers were measured here


@functools.cache
def module(name):
    """An experiment file, imported once."""
    spec = importlib.util.spec_from_file_location('experiment', EXPERIMENTS / f'{name}.py')
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def given(name, arg):
    """What an experiment gives, as config.complete takes it."""
    return module(name).get_config(arg).to_dict()


def shrink_view(section, factor):
    """Scales the sides in pixels of a section's view; floats are shares of a side."""
    view = section.get('view')
    if isinstance(view, dict):
        given = {k: view[k] for k in ('resize', 'smaller', 'before', 'crop') if view.get(k)}
        section['view'] = view | jax.tree.map(
            lambda n: n if isinstance(n, float) else max(round(n * factor), 8), given
        )


def teacher(path):
    """Writes a small CNN of the digits' ten classes, once."""
    if not path.exists():
        model = models.build('bit', num_classes=10, units=(3,), width=0.5, kernel_epsilon=1e-8)
        params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
        vit_jax.save(path, model, params['params'], format='timm', image_size=32)
    return str(path)


def folder_of_scenes(path, task):
    """Pictures with label maps in a folder as ADE20K's, or as COCO's with objects or segments.

    It is made once.
    """
    rng, kinds = np.random.default_rng(0), [
        dict(id=1, name='a', isthing=1), dict(id=2, name='b', isthing=0)
    ]
    for part, short in () if path.exists() else (('training', 'train'), ('validation', 'val')):
        images = path / (f'images/{part}' if task == 'segment' else f'{short}2017')
        beside = path / 'annotations'
        maps = beside / (part if task == 'segment' else f'panoptic_{short}2017')
        content = dict(images=[], annotations=[], categories=kinds)
        for folder in (images, maps):
            folder.mkdir(parents=True, exist_ok=True)
        for i in range(8):
            labels, picture = scenes.blocks((40, 48), rng)
            Image.fromarray(picture).save(images / f'{i}.jpg')
            content['images'].append(dict(id=i, file_name=f'{i}.jpg', width=48, height=40))
            if task == 'detect':
                content['annotations'].append(dict(
                    id=i + 1, image_id=i, category_id=1 + i % 2, bbox=[8, 4, 20, 16], area=320,
                    iscrowd=0, segmentation=scenes.rectangle((8, 4, 28, 20)),
                ))  # fmt: skip
                continue
            Image.fromarray(labels).save(maps / f'{i}.png')
            segments = [dict(id=int(k), category_id=1 + int(k) % 2, iscrowd=0)
                        for k in np.unique(labels[labels > 0])]  # fmt: skip
            content['annotations'].append(
                dict(image_id=i, file_name=f'{i}.png', segments_info=segments)
            )
        if task != 'segment':
            name = dict(detect='instances', panoptic='panoptic')[task]
            (beside / f'{name}_{short}2017.json').write_text(json.dumps(content))
    return str(path)


def dense(values, data_dir):
    """The section `data` of `toy` for label maps or objects; changes objective and evaluations."""
    objective, data = values['objective'], values['data']
    task = data['task']
    source = dict(name=folder_of_scenes(pathlib.Path(data_dir) / task, task))
    smaller = dict(queries=8, query_blocks=1, points=16, most_masks=4)
    objective |= {name: n for name, n in smaller.items() if name in objective}
    data |= dict(classes=5) if data['task'] == 'segment' else dict(most=8)
    for one in values['evals'].values():
        part = 'validation' if task == 'segment' else 'val'
        one |= dict(image_size=32, source=dict(source, split=part))
        sides = {'canvas': 48, 'stride': 16}
        one |= {name: n for name, n in sides.items() if one.get(name)}
    return dict(source, split='train')


def folder_of_captions(path):
    """16 pictures with a caption each, and a tokenizer of their words in tokenizer/, made once."""
    rng, lines = np.random.default_rng(0), []
    if not path.exists():
        words.clip(path / 'tokenizer')
        for i, caption in enumerate(words.captions(16)):
            Image.fromarray(scenes.blocks((40, 48), rng)[1]).save(path / f'{i}.jpg')
            lines.append(json.dumps(dict(file_name=f'{i}.jpg', text=caption)))
        (path / 'captions.jsonl').write_text('\n'.join(lines))
    return str(path)


def captioned(values, data_dir):
    """The section `data.source` of `toy` for images with texts; changes objective and evaluations.

    Labels and templates of ImageNet are of a package that tests do not have.
    """
    place = folder_of_captions(pathlib.Path(data_dir) / 'captions')
    text = dict(width=32, depth=2, num_heads=2, mlp_dim=32, unroll=1, vocab_size=1000)
    if values['model'].get('num_classes'):
        values['model']['num_classes'], text['num_classes'] = 16, 16
    values['objective']['text'] |= text
    values['data'] |= dict(tokenizer=f'{place}/tokenizer')
    for one in values['evals'].values():
        if one['type'] == 'zero_shot':
            one |= dict(labels=None, templates=('a {}.', 'one {}'))
            one['source'] = dict(name='digits', data_dir=data_dir, split='test[:10%]')
        else:
            one['source'] = dict(name=place, label=None)
    return dict(name=place, label=None)


def toy(values, data_dir, steps=2, test='test[:10%]'):
    """The same recipe with a tiny model on a few tiny images: two steps take seconds.

    `test` are the digits of its evaluations. Scanned blocks compile in half the time.
    """
    model, name = values['model'], values['model']['name']
    several = values['objective'].get('loss') == 'sigmoid' if 'objective' in values else False
    few = dict(name='jft_like:48x8@32') if several else dict(name='digits', data_dir=data_dir)
    if name.startswith('bit'):
        model |= dict(name='bit', units=(1, 1), width=0.5)
    elif name.startswith('mixer'):
        small = dict(depth=2, tokens_mlp_dim=16, mlp_dim=32, unroll=1)
        model |= dict(name='mixer/16', width=32) | small
    else:
        root = dict(resnet=(1, 1), resnet_width=0.5, patch_size=2) if '+' in name else {}
        small = dict(depth=2, num_heads=2, mlp_dim=32, unroll=1)
        model |= dict(name='vit/16', width=32) | small | root
    if model.get('representation_size'):
        model['representation_size'] = 16
    if values['data'].get('task') == 'crops':
        values['data']['local_size'] = 16
        values['objective'] |= dict(prototypes=64, hidden=32, bottleneck=16)
    if values.get('objective', {}).get('name') == 'next_patch':
        values['objective'] |= dict(head_depth=1, head_width=32)
    if 'blocks' in values.get('objective', {}):
        values['objective']['blocks'] = min(values['objective']['blocks'], 2)
    if 'teacher' in values.get('objective', {}):
        values['objective']['teacher'] = teacher(pathlib.Path(data_dir) / 'teacher')
    larger = 32 / values['data']['image_size']
    task = values['data'].get('task')
    others = {'image_text': captioned, 'segment': dense, 'detect': dense, 'panoptic': dense}
    source = others[task](values, data_dir) if task in others else dict(few, split='train')
    values['data'] |= dict(source=source, image_size=32, batch_size=8)
    shrink_view(values['data'], larger)
    chosen = values.get('select', {})
    chosen |= dict(split='train') if 'split' in chosen else {}
    for one in (*values['evals'].values(), *chosen.get('evals', {}).values()):
        for key in ('source', 'train_source'):
            if key in one and task not in others:
                data = dict(name='digits', data_dir=data_dir) if 'type' in one else few
                split = test if data['name'] == 'digits' else 'test'
                one[key] = dict(data, split=split if key == 'source' else 'train')
        one |= dict(batch_size=8)
        shrink_view(one, larger)
    values['optim'] |= dict(warmup=1, **({'cooldown': 1} if 'cooldown' in values['optim'] else {}))
    values['mesh'] = {}
    values.pop('epochs', None)
    return values | dict(steps=steps, init_from=None)
