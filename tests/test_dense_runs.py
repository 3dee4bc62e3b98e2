"""Runs that learn masks and boxes, killed and moved to other devices, and evaluated on several."""

import jax
import launched
import numpy as np
import processes
import pytest
import tiny_dense
import tiny_detect
import tiny_segment

from vit_jax import assembly, config

STEPS = 24
SAME = (  # small steps, and not Adam's: differences by rounding must not grow
    f'--config.steps={STEPS}', '--config.checkpoint.every=4', '--config.optim.name=sgd',
    '--config.optim.lr=0.003', '--config.optim.clip=1.0',
)  # fmt: skip
METHODS = {
    'linear': (tiny_segment, ()),
    'masks': (tiny_segment, (
        '--config.objective.name=masks', '--config.objective.queries=4',
        '--config.objective.query_blocks=1', '--config.objective.points=16',
    )),
    'detect': (tiny_detect, ()),
}  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8})


@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_killed_it_resumes_to_the_bit_and_moves_to_other_devices(folder, tmp_path, name):
    module, flags = METHODS[name]

    def finish(workdir, *more, **options):
        found = launched.finish(
            folder, workdir, *SAME, *flags, *more, config=module.__file__, **options
        )
        assert found[0] == 0, found[1]

    def killed(workdir, *more, **options):
        process = launched.start(
            folder, workdir, *SAME, *flags, *more, config=module.__file__, **options
        )
        launched.wait_for(lambda: launched.checkpoints(workdir), process, workdir)
        launched.kill(process)

    whole, again, moved = (tmp_path / n for n in ('whole', 'again', 'moved'))
    finish(whole)
    killed(again, '--config.data.workers=2')
    finish(again)
    assert launched.checkpoints(again) == launched.checkpoints(whole)
    for saved in launched.checkpoints(whole):
        a, b = (launched.state(w, saved) for w in (again, whole))
        assert any(k.startswith('params/vit/') for k in a)
        assert ('extra/mean' in a) == (name == 'linear')
        launched.assert_same_bits(a, b)
    assert launched.timeless(again) == launched.timeless(whole)

    killed(moved, '--config.mesh.fsdp=4', devices=8)
    finish(moved, '--config.mesh.fsdp=2', devices=2)
    assert 'resumed at step' in launched.log_of(moved).read_text()
    for ours, theirs in zip(launched.timeless(moved), launched.timeless(whole), strict=True):
        assert ours.keys() == theirs.keys() and ours['step'] == theirs['step']
        if 'loss' in ours:
            np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=1e-3)


@pytest.mark.slow
def test_evaluations_on_two_processes_count_each_image_once(tmp_path):
    """Seven images in batches of four, on two processes with two devices each."""
    folder, file = tiny_dense.write(tmp_path / 'data'), tiny_dense.__file__
    processes.finish(folder, tmp_path / 'run', 2, 2, config=file)
    made = launched.metrics(tmp_path / 'run')
    batches = [(f'evals.{name}.batch_size', '3') for name in ('maps', 'objects', 'panoptic')]
    parts = assembly.make(config.load(f'{file}:{folder}', batches), devices=jax.devices()[:1])
    for name, evaluation in parts.evals.items():
        wanted = evaluation(parts.objective.init(jax.random.key(0)))
        [line] = [one for one in made if f'{name}/examples' in one]
        found = {key.removeprefix(f'{name}/'): x for key, x in line.items() if key != 'step'}
        assert {key: found[key] for key in wanted} == wanted and wanted['examples'] == 7
        scores = {key: x for key, x in wanted.items() if key != 'examples'}
        assert len(scores) > 5 and 0.1 < np.mean(list(scores.values())) < 0.999, scores
