"""Runs that learn masks and boxes, killed and moved to other devices."""

import launched
import numpy as np
import pytest
import tiny_detect
import tiny_segment

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
