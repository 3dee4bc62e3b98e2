"""How runs transfer: what is read of a folder of runs, and the page that is drawn of it."""

import json
import subprocess
import sys

import launched
import numpy as np
import pytest
from PIL import Image

from vit_jax.data import distort
from vit_jax.figures import grid, methods, scaling
from vit_jax.run import workdir

TASKS = ('digits', 'fashion')


def write(folder, name, model, images, metrics, init_from=None, flops=10e6, data=None):
    """A finished run, of which there is no more than what tells of it."""
    source = dict(name=data or f'jft_like:{images}x10@32', split='train')
    model = model | dict(num_classes=images or None)
    evals = dict(digits=dict(type='probe'), test=dict(type='classify'))
    config = dict(model=model, data=dict(source=source), evals=evals, init_from=init_from)
    save(folder / name, config, metrics, flops)


def save(path, config, metrics, flops):
    """The folder of a finished run."""
    path.mkdir(parents=True)
    costs = dict(exaflops=3 * flops * 64_000 / 1e18, device_hours=0.5)
    result = dict(
        metrics=metrics, flops_per_image=flops, seconds=1800.0, costs=costs, steps=1000,
        device_count=1, device_kind='cpu', examples_seen=64_000, expected=[],
    )  # fmt: skip
    for part, value in (('config', config), ('result', result)):
        (path / f'{part}.json').write_text(json.dumps(value))


@pytest.fixture
def study(tmp_path):
    """Two models, of which one is pre-trained on two numbers of images, and both on the larger."""
    folder = tmp_path / 'runs' / 'study'
    models = {'a': (dict(name='vit/8', resnet=None), 10e6), 'b': (dict(name='bit-r50x1'), 8e9)}
    for name, (model, flops) in models.items():
        for images in (1000, 3000)[name == 'b' :]:
            begin = f'{name},{images}'
            few = {f'{task}/10_shot': 0.1 + images / 1e5 for task in TASKS}
            more = {'digits/accuracy': 0.9, 'test/accuracy': 0.4625, 'digits/10_shot_std': 0.01}
            write(folder, begin, model, images, few | more, flops=flops)
            for task in TASKS:
                write(
                    folder, f'{task},{begin}', model, 0, {'test/accuracy': 0.2 + images / 1e4},
                    f'runs/study/{begin}', flops, task,
                )  # fmt: skip
        for task in TASKS:
            none, metrics = f'{task},{name},none', {'test/accuracy': 0.15}
            write(folder, none, model, 0, metrics, flops=0.9 * flops, data=task)  # a smaller head
    return folder


def test_points_are_those_of_the_run_that_another_began_from(study):
    found = scaling.points(workdir.finished([study]))
    a, b = ('ViT, 10 MFLOP', 'ViT', 10e6), ('bit-r50x1', 'ResNet', 8e9)
    expected = set()
    for (model, family, flops), sizes in ((a, (1000, 3000)), (b, (3000,))):
        exa = 3 * flops * 64_000 / 1e18
        for task in TASKS:
            tuned, few = f'{task}, fine-tuned', f'{task}, 10 shots of each class'
            expected.add(scaling.Point(tuned, model, family, 0, 0.0, 0.15))
            for n in sizes:
                expected.add(scaling.Point(tuned, model, family, n, exa, 0.2 + n / 1e4))
                expected.add(scaling.Point(few, model, family, n, exa, 0.1 + n / 1e5))
    assert set(found) == expected and len(found) == len(expected)


@pytest.mark.parametrize('model, family', [
    (dict(name='vit-b/16', resnet=None), 'ViT'), (dict(name='mixer-b/16'), 'Mixer'),
    (dict(name='r50+vit-b/16', resnet=(3, 4, 9)), 'hybrid'), (dict(name='bit'), 'ResNet'),
    (dict(name='vit/1', resnet=()), 'hybrid'),
])  # fmt: skip
def test_families(model, family):
    assert scaling.family_of(model) == family


def test_seeds_are_averaged():
    assert scaling.curve([(3, 0.5), (1, 0.25), (3, 1.0)]) == ([1, 3], [0.25, 0.75])
    assert scaling.curve([]) == ([], [])


def write_point(
    folder, name, augmentation, rate, value, decay=0.1, seed=0, split='train', layers=2, begin=None
):
    """A finished run of AugReg's grid."""
    preset = distort.AUGREG[augmentation]
    augment = [one | dict(layers=layers) for one in preset['augment']]
    config = dict(
        model=dict(name='vit-s/16', dropout=rate, drop_path=rate), seed=seed,
        data=dict(source=dict(name='imagenet2012', split=split), augment=augment), init_from=begin,
        objective=dict(mixup=preset['mixup']), optim=dict(weight_decay=decay),
        evals=dict(val=dict(type='classify')),
    )  # fmt: skip
    save(folder / name, config, {'val/accuracy': value}, 9e9)


def test_a_grid_has_the_best_decay_of_averaged_seeds(tmp_path):
    folder = tmp_path / 'runs'
    write_point(folder, 'a', 'strong1', 0.0, 0.71)
    write_point(folder, 'b', 'none', 0.0, 0.60, decay=0.03)
    write_point(folder, 'c', 'none', 0.0, 0.66, decay=0.03, seed=1)
    write_point(folder, 'd', 'none', 0.0, 0.62, decay=0.1)
    write_point(folder, 'e', 'medium2', 0.1, 0.68)
    write_point(folder, 'f', 'none', 0.1, 0.64)
    write_point(folder, 'g', 'none', 0.0, 0.95, begin='runs/x')  # other weights, another grid
    write_point(folder, 'alone', 'none', 0.0, 0.9, split='train[:1%]')  # no grid of its own
    panel, = grid.panels(workdir.finished([folder]))
    assert panel.augmentations == ('none', 'medium2', 'strong1') and panel.rates == ('0', '0.1')
    np.testing.assert_allclose(panel.values, [[0.63, np.nan, 0.71], [0.64, 0.68, np.nan]])
    np.testing.assert_allclose(panel.gains, [[0, np.nan, 8], [1, 5, np.nan]])
    np.testing.assert_allclose(panel.regularized, -3)
    grid.draw(tmp_path / 'grid.png', [panel])
    with Image.open(tmp_path / 'grid.png') as picture:
        pixels = np.array(picture.convert('RGB')).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    drawn = dict(zip(map(tuple, colours.tolist()), counts, strict=True))
    assert drawn[0x7F, 0x3B, 8] > 5000  # the ends of ColorBrewer's PuOr: +8 is the largest gain
    assert (0x2D, 0, 0x4B) not in drawn


def test_augmentations_of_equal_strength_are_no_seeds_of_one(tmp_path):
    for layers, value in ((3, 0.6), (4, 0.8)):  # neither a preset
        write_point(tmp_path, f'{layers}', 'strong1', 0.0, value, layers=layers)
    panel, = grid.panels(workdir.finished([tmp_path]))
    assert sorted(panel.values[0]) == [0.6, 0.8]


def figures(*arguments):
    return subprocess.run(
        [sys.executable, '-m', 'vit_jax.figures', *map(str, arguments)],
        capture_output=True, text=True, env=launched.ENVIRONMENT,
    )  # fmt: skip


@pytest.mark.slow
def test_a_folder_of_runs_is_drawn(study, tmp_path):
    out = tmp_path / 'out'
    drawn = figures(study, '--out', out)
    assert drawn.returncode == 0, drawn.stderr
    names = ['images.png', 'compute.png']
    said = [f'Picture: {out}/{name}' for name in names]
    assert drawn.stdout.splitlines() == [*said, f'Page: {out}/page.html']
    for name in names:
        with Image.open(out / name) as picture:
            pixels = np.array(picture.convert('RGB')).reshape(-1, 3)
        drawn_in = {tuple(colour) for colour in np.unique(pixels, axis=0)}
        ours = {0: (0, 0x72, 0xB2), 2: (0, 0x9E, 0x73)}  # of ViTs and ResNets
        assert ours[0] in drawn_in
        assert (ours[2] in drawn_in) == (name == 'compute.png')  # on one number of images alone
    page = (out / 'page.html').read_text()
    assert '13; 6.5 device-hours in all.' in page
    assert page.count('<td>0.4625</td>') == 3 and '<td>0.9</td>' not in page
    assert figures(study).returncode == 2  # a folder of runs is left as it is


@pytest.mark.slow
def test_runs_that_begin_from_no_other_have_no_such_pictures(study, tmp_path):
    for path in study.iterdir():
        if path.name.count(',') == 2 and not path.name.endswith('none'):
            (path / 'result.json').unlink()
    for path in study.glob('*,*000/result.json'):
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {'metrics': {'test/accuracy': 0.5}}))
    drawn = figures(study, '--out', tmp_path / 'out')
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout == f'Page: {tmp_path}/out/page.html\n'


def test_methods_are_compared_with_random_weights(tmp_path):
    probe = dict(evals=dict(probe=dict(type='probe', l2=1.0, k=(10,))), model=dict(name='vit/7'))
    for name, source, steps, value in (
        ('mae', 'digits', 9, 0.5), ('mae', 'drawn', 9, 0.4), ('dino', 'digits', 9, 0.3),
        ('supervised', 'digits', 1, 0.2),
    ):
        config = probe | dict(
            objective=dict(name=name), steps=steps, data=dict(source=dict(name=source))
        )
        metrics = {'probe/accuracy': value, 'probe/10_nn_cosine': value / 2, 'probe/10_nn': 1.0}
        save(tmp_path / f'{name},{source}', config, metrics, 9e9)
    tuned = dict(
        evals=dict(test=dict(type='classify')), model=dict(name='vit/7', pool='gap'),
        objective={}, steps=9, data=dict(source=dict(name='few')),
    )  # fmt: skip
    for seed, begin, value in ((0, 'mae,digits', 0.7), (1, 'mae,digits', 0.8), (0, None, 0.6),
                               (0, 'gone', 0.0)):  # fmt: skip
        start = begin and f'{tmp_path.name}/{begin}'
        config = tuned | dict(seed=seed, init_from=start)
        save(tmp_path / f'tuned,{begin},{seed}', config, {'test/accuracy': value}, 9e9)
    found = methods.points(workdir.finished([tmp_path]))
    assert sorted(found) == sorted(
        [methods.Point('few, fine-tuned', 'mae', 'digits', v) for v in (0.7, 0.8)]
        + [methods.Point('few, fine-tuned', methods.NONE, 'gap', 0.6)]
        + [
            methods.Point(f'probe/{metric}', method, source, value * factor)
            for metric, factor in (('accuracy', 1), ('10_nn_cosine', 0.5))
            for method, source, value in (
                ('mae', 'digits', 0.5), ('mae', 'drawn', 0.4), ('dino', 'digits', 0.3),
                (methods.NONE, '', 0.2),
            )
        ]
    )  # fmt: skip
    methods.draw(tmp_path / 'methods.png', found)
    with Image.open(tmp_path / 'methods.png') as picture:
        drawn = {tuple(pixel) for pixel in np.array(picture.convert('RGB')).reshape(-1, 3)}
    assert {(0, 0x72, 0xB2), (0xE6, 0x9F, 0)} <= drawn
    assert not methods.points(workdir.finished([tmp_path / 'mae,digits']))
