"""Plans: what they count against what must be so, on simulated devices and by the TPU compiler."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from vit_jax import assembly, sharding
from vit_jax import config as configs
from vit_jax.distributed import devices, interconnect, topologies
from vit_jax.errors import UserError
from vit_jax.plan import data_sets, estimate, exchanges, fitting, hlo, rehearsal

HERE = pathlib.Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='the TPU compiler is not installed: pip install "vit_jax[plan]"',
)
EXPERIMENT = '''
from ml_collections import ConfigDict

def get_config(arg=None):
    config = ConfigDict(dict(steps=100))
    config.model = dict(name='vit-ti/16', width=64, depth=4, num_heads=4, mlp_dim=256, patch_size=8)
    config.data = dict(
        source=dict(name=arg or 'imagenet2012'), view='resize', image_size=32, batch_size=64
    )
    config.evals = dict(val=dict(source=dict(name='nowhere', split='validation'), every=10))
    config.optim = dict(lr=1e-3, weight_decay=0.1, clip=1.0)
    return config
'''


@pytest.fixture(scope='session')
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp('plan') / 'experiment.py'
    path.write_text(EXPERIMENT)
    return str(path)


def run(*arguments):
    """Exit status, output and errors of the command in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
    done = subprocess.run(
        [sys.executable, '-m', 'vit_jax.plan', *arguments], cwd=HERE, capture_output=True,
        text=True, env=environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def planned(experiment, count=8, peaks=None, **changes):
    """The plan on simulated devices, in this process."""
    config = configs.load(experiment, list(changes.pop('overrides', {}).items()))
    source, _ = data_sets.load(config.data.source, 1000, 10)
    peaks = peaks or devices.DEVICES['TPU v4']
    return estimate.plan(
        config, source, jax.devices()[:count], f'cpu:{count}', efficiency=0.5, peaks=peaks
    )


@pytest.fixture(scope='session')
def whole(experiment):
    return planned(experiment)


def test_state_falls_by_the_degree_of_fsdp(experiment):
    sizes = {}
    for fsdp in (1, 2, 8):
        config = configs.load(experiment, [('mesh.fsdp', str(fsdp))])
        source, _ = data_sets.load(config.data.source, 1000, 10)
        parts = assembly.make(estimate.without_evals(config), source, jax.devices())
        sizes[fsdp] = estimate.bytes_per_device(parts.abstract)
        rows = [(name, count) for name, _, count, *_ in parts.tx.table]
        kernels = sum(count for name, count in rows if name.endswith('kernel'))
        others = sum(count for name, count in rows if not name.endswith('kernel'))
        assert kernels > 40 * others
        adam = 3 * 4 * (kernels / fsdp + others)  # parameters and two moments
        assert sizes[fsdp] == pytest.approx(adam, rel=1e-4)  # and two counts


def test_a_plan_is_what_the_program_does(whole):
    plan = whole
    memory, seconds, peaks = plan['memory'], plan['seconds'], plan['peaks']
    assert plan['flops_per_image'] == pytest.approx(plan['model_flops_per_image'], rel=0.05)
    assert plan['flops'] * 8 == pytest.approx(64 * plan['flops_per_image'])
    assert memory['fits'] and memory['state'] + memory['activations'] < memory['needed'] * 1.01
    assert seconds['compute'] == pytest.approx(plan['flops'] / 275e12)
    assert seconds['memory'] == pytest.approx(plan['traffic'] / 1.2e12)
    sent = plan['collectives']['all-reduce']['sent']
    assert seconds['interconnect'] == pytest.approx(sent / peaks['link'])
    assert seconds['exposed'] == pytest.approx(seconds['interconnect'])  # a CPU hides nothing
    assert seconds['roofline'] == max(seconds[k] for k in ('compute', 'memory', 'interconnect'))
    assert seconds[plan['bound']] == seconds['roofline']
    busy = max(seconds['compute'], seconds['memory'])
    assert seconds['step'] == pytest.approx(2 * busy + seconds['exposed'])
    assert plan['images_per_second'] == pytest.approx(64 / seconds['step'])
    assert plan['days'] == pytest.approx(100 * seconds['step'] / 86_400)
    assert plan['core_days'] == pytest.approx(plan['days'] * 8 * 2)  # a v4 has two cores


def collective(kind='all-reduce', size=10**9, group=4, members=(0, 1, 2, 3)):
    return hlo.Collective(kind, size, (), group, members, 1, 0, False, '')


class Chip:
    """What a device of JAX tells of its place."""

    platform = 'tpu'

    def __init__(self, coords, slice_index=0):
        self.coords, self.slice_index = coords, slice_index


def test_times_of_exchanges_by_hand():
    v5e, v4 = devices.DEVICES['TPU v5 lite'], devices.DEVICES['TPU v4']
    row = [Chip((x, 0, 0)) for x in range(4)]
    # 2 x 3/4 GB by one link of 50 GB/s, as a side of 4 of a v5e is no ring; on a v4 it is one
    assert interconnect.exchange_seconds(collective(), row, v5e) == pytest.approx((1.5 / 50, 0))
    cube = [Chip((x, y, z)) for z in range(4) for y in range(4) for x in range(4)]
    assert interconnect.exchange_seconds(collective(), cube, v4) == pytest.approx((1.5 / 100, 0))
    gather = collective('all-gather', group=64, members=tuple(range(64)))
    assert interconnect.exchange_seconds(gather, cube, v4) == pytest.approx((63 / 64 / 300, 0))
    every_other = collective(group=2, members=(0, 2))  # shares its links with the group of 1 and 3
    assert interconnect.exchange_seconds(every_other, row, v5e) == pytest.approx((1 / 25, 0))
    # two slices of two: within, half by half, then 1/2 GB between, by 25 Gbit/s
    both = [Chip((x, 0, 0), s) for s in range(2) for x in range(2)]
    assert interconnect.exchange_seconds(collective(), both, v5e) == pytest.approx(
        (1 / 50, 0.5 / 3.125)
    )
    kinds = exchanges.by_kind(SimpleNamespace(collectives=[collective()]), both, v5e)
    assert [*kinds] == ['all-reduce', 'all-reduce between slices']
    assert sum(row['sent'] for row in kinds.values()) == pytest.approx(collective().wire)


def test_transfers_between_slices_wait_for_each_other():
    second = devices.DEVICES['TPU v5']._replace(network=1e9, clock=1e3)

    def waits(*spans):
        """For transfers of 1 GB, a second each, with work of so many milliseconds around them."""
        made = [collective(group=2)._replace(network=True, span=span) for span in spans]
        return exchanges.waiting(SimpleNamespace(collectives=made), second)

    assert waits((0, 1500), (200, 2000)) == 0
    assert waits((0, 1500), (700, 1500)) == pytest.approx(0.5)  # the second one begins at 1,000
    assert waits((0, 500)) == pytest.approx(0.5)
    assert waits((300, 300)) == pytest.approx(1)


@pytest.mark.parametrize('arguments, words', [
    (['--topology=v9:2x2'], 'v2, v3, v4, v5e, v5p, v6e, tpu7x'),
    (['--topology=v5e', '--chips=100'], 'a slice of v5e has no 100 chips, but 1, 4, 8, 16'),
    (['--topology=v5e:32x32'], 'a pod of v5e has 256'),
    (['--topology=cpu:none'], 'as cpu:8 has'),
    (['--topology=cpu:8', '--config.data.batch_size=60'], '8 and its multiples'),
    (['--topology=cpu:8', '--config.mesh.fspd=2'], 'mesh.fsdp'),
    (['--topology=cpu:8', '--config=nowhere.py'], 'no experiment file nowhere.py'),
])  # fmt: skip
def test_mistakes_are_one_line(experiment, arguments, words, monkeypatch, capsys):
    check_mistake(['--config', experiment, *arguments], words, monkeypatch, capsys)


def test_a_method_without_images_is_described_without_their_size():
    full = configs.load('experiments/digits.py')
    table = [('encoder/kernel', (2, 3), 6, '1', 0.0, False)]
    parts = SimpleNamespace(
        tx=SimpleNamespace(table=table), objective=SimpleNamespace(flops=2e3), spec={'tokens': None}
    )
    text = rehearsal.model_text(full, parts, [0])
    assert text.endswith(': 6 parameters, 2 kFLOP an example forward')


def test_settings_that_a_method_lacks_are_left_out():
    from vit_jax.plan import __main__ as plan

    lacking = dict.fromkeys(('image_size', 'dtype', 'matmul_dtype', 'remat'))
    found = plan.settings_text(dict(lacking, model='mine.py:byol', batch_size=8, accumulate=2))
    assert found == 'mine.py:byol, batches of 8 in 2'


@pytest.mark.parametrize('value', ['0', '2', '-1'])
def test_an_efficiency_is_a_share(value):
    from vit_jax.plan import __main__ as plan

    with pytest.raises(flags.IllegalFlagValueError, match='not a number in the range'):
        flags.FLAGS[plan.EFFICIENCY.name].parse(value)


def check_mistake(arguments, words, monkeypatch, capsys):
    from vit_jax import cli
    from vit_jax.plan import __main__ as plan

    rest, changes = cli.split_changes(['plan', *arguments], 'config')
    flags.FLAGS.unparse_flags()
    flags.FLAGS(rest)
    try:
        with pytest.raises(UserError) as e:
            plan.main(rest[:1], changes)
    finally:
        for name in ('topology', 'chips', 'efficiency'):
            flags.FLAGS[name].value = flags.FLAGS[name].default
    assert words in str(e.value) and '\n' not in str(e.value)


def test_a_data_set_that_is_not_here(experiment):
    config = configs.load(experiment)
    source, note = data_sets.load(config.data.source)
    assert (len(source), len(source.classes)) == (1_281_167, 1000) and 'imagenet2012' in note
    part, _ = data_sets.load({**config.data.source, 'split': 'train[:50%]'})
    assert len(part) == round(1_281_167 / 2)
    with pytest.raises(UserError, match='--examples and --classes'):
        data_sets.load({**config.data.source, 'name': 'nowhere'})
    drawn, note = data_sets.load({**config.data.source, 'name': 'jft_like:5000x70'})
    assert (len(drawn), len(drawn.classes), note) == (5000, 70, None)
    parts = {n: dict(name=f'data/{n}', label=None, weight=1.0) for n in ('cc12m', 'yfcc15m')}
    pairs, _ = data_sets.load(dict(mixture=parts))
    assert (len(pairs), pairs.classes) == (25_000_000, ())
    pairs, _ = data_sets.load(dict(name='nowhere', label=None), examples=7)
    assert (len(pairs), pairs.classes) == (7, ())
    parts['cc12m']['name'] = 'nowhere'
    with pytest.raises(UserError, match='--examples'):
        data_sets.load(dict(mixture=parts))


@pytest.mark.slow
def test_the_command_on_simulated_devices(experiment):
    status, out, err = run('--config', experiment, '--topology=cpu:4', '--json')
    assert status == 0, err
    plan = json.loads(out)
    assert plan['devices'] == 4 and plan['mesh'] == {'data': 4, 'fsdp': 1, 'tensor': 1}
    assert any('imagenet2012' in note for note in plan['notes'])


@pytest.mark.slow
def test_what_fit_finds_makes_it_fit(experiment, whole):
    small = devices.DEVICES['TPU v4']._replace(usable=0.85 * whole['memory']['needed'])
    first = {**whole, 'memory': {**whole['memory'], 'available': small.usable, 'fits': False}}
    said = []
    config = configs.load(experiment)
    source, _ = data_sets.load(config.data.source, 1000, 10)
    changes, found = fitting.fit(
        config, source, jax.devices(), 'cpu:8', first, said.append, efficiency=0.5, peaks=small
    )
    assert changes and found['memory']['fits'] and 'fits' in said[-1]
    again = planned(experiment, peaks=small, overrides={k: str(v) for k, v in changes.items()})
    assert again['memory']['needed'] == found['memory']['needed'] <= small.usable


def test_the_cheapest_is_tried_first(experiment, whole):
    rows = fitting.candidates(configs.load(experiment), whole)
    keys = [tuple(sorted(row)) for row in rows]
    dots = {'model.remat': 'dots_with_no_batch_dims_saveable'}
    assert rows[0] in ({'accumulate': 2}, {'mesh.fsdp': 2}, dots)
    assert len(set(map(str, rows))) == len(rows) and ('model.remat',) in keys
    assert rows.index(dots) < rows.index({'model.remat': 'full'})
    assert rows.index({'accumulate': 2}) < rows.index({'accumulate': 4})


@needs_compiler
def test_meshes_of_any_degree_on_a_slice_and_on_two():
    found, title = topologies.get_devices('v4', 128)
    assert title == 'v4:4x4x8' and len(found) == 128  # both cores of a chip are one device
    for fsdp in (1, 2, 8, 32, 128):
        assert sharding.make_mesh(found, fsdp=fsdp).shape['fsdp'] == fsdp
    two, title = topologies.get_devices('v5e:4x4', slices=2)
    mesh = sharding.make_mesh(two, fsdp=8)
    assert title == '2 slices of v5e:4x4'
    assert all(len({d.slice_index for d in group}) == 1 for group in mesh.devices[:, :, 0])


@needs_compiler
def test_the_tpu_compiler_counts_as_the_model_does(experiment):
    found, title = topologies.get_devices('v5e:2x2')
    config = configs.load(experiment, [
        ('model.dtype', 'bfloat16'), ('model.depth', '3'), ('optim.clip', 'None'),
        ('model.pool', 'gap'),  # reads all tokens
    ])  # fmt: skip
    source, _ = data_sets.load(config.data.source, 1000, 10)
    plan = estimate.plan(config, source, found, title, efficiency=0.5)
    assert plan['flops_per_image'] == pytest.approx(plan['model_flops_per_image'], rel=0.05)
    assert set(plan['collectives']) == {'all-reduce'}
    gradients = 2 * plan['parameters']  # they are bfloat16 when they are summed
    assert plan['collectives']['all-reduce']['bytes'] == pytest.approx(gradients, rel=0.1)
    assert plan['memory']['fits'] and plan['seconds']['compiler'] > plan['seconds']['roofline']
    assert plan['memory']['available'] == pytest.approx(15.75 * 2**30)


@needs_compiler
def test_the_tpu_compiler_says_what_does_not_fit():
    found, _ = topologies.get_devices('v5e:2x2')
    place = jax.sharding.SingleDeviceSharding(found[0])
    x = jax.ShapeDtypeStruct((2**34,), jnp.bfloat16, sharding=place)

    with pytest.raises(estimate.Refused) as e:
        estimate.compile_or_refuse(jax.jit(lambda x: x + 1).lower(x))
    assert e.value.available == pytest.approx(15.75 * 2**30, rel=0.001)
    assert e.value.needed >= 2**35


@needs_compiler
@pytest.mark.slow
def test_status_1_where_it_does_not_fit():
    status, out, err = run('--config=experiments/pretrain.py:h/14', '--topology=v5e', '--chips=4')
    assert (status, err) == (1, '')
    assert 'does not fit' in out and 'of 15.75 GiB' in out


@needs_compiler
@pytest.mark.slow
def test_fit_on_a_slice_of_tpus(experiment):
    # One wide block, whose weights exceed a chip's memory, compiles faster than deep activations.
    arguments = [f'--config={experiment}', '--topology=v5e:2x2', '--config.model.dtype=bfloat16',
                 '--config.model.width=12288', '--config.model.num_heads=96',
                 '--config.model.mlp_dim=49152', '--config.model.depth=1',
                 '--config.data.batch_size=8']  # fmt: skip
    status, out, err = run(*arguments, '--json', '--fit')
    assert status == 1, err
    plan = json.loads(out)
    assert not plan['memory']['fits'] and plan['fit']['plan']['memory']['fits']
    status, out, err = run(*arguments, '--json', *plan['fit']['flags'].split())
    assert status == 0, err
    assert json.loads(out)['memory'] == plan['fit']['plan']['memory']
