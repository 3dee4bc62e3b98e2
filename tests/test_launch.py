"""launch.sh: mistakes, processes of this machine, SLURM, sweeps. Real ones where they can be."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import launched
import pytest
from launching import EXPERIMENT, GKE, ROOT, TPU, assert_one_line, finish, runs, said

from vit_jax import sweep
from vit_jax.errors import UserError

SLURM = ('slurm', '--nodes=2', '--gpus-per-node=4')


def test_shell_is_clean():
    scripts = ['launch.sh', '.ci/run', *map(str, (ROOT / 'launch').glob('*.sh'))]
    assert len(scripts) == 7
    shellcheck = pathlib.Path(sys.executable).with_name('shellcheck')
    subprocess.run([shellcheck, *scripts], cwd=ROOT, check=True)


@pytest.mark.parametrize('words, message', [
    (('local', '--frob', EXPERIMENT), 'unknown option --frob of local'),
    (('local',), 'no EXPERIMENT'),
    (('local', 'experiments/nix.py'), 'experiments/digits.py'),
    (('local', EXPERIMENT, 'more'), 'unexpected argument more'),
    (('local', '--sweep', EXPERIMENT), '--sweep has no value; write --sweep KEY=A,B'),
    (('hosts', EXPERIMENT), 'no --processes given'),
    (('hosts', '--processes', '--devices=2', EXPERIMENT), '--processes has no value'),
    (('hosts', '--processes=two', EXPERIMENT), "--processes is 'two', not a whole number"),
    (('slurm', '--nodes=2', EXPERIMENT), '--gpus-per-node'),
    (('slurm', '--exclusive', EXPERIMENT), 'unknown option --exclusive'),
    (('tpu', '--zone=z', EXPERIMENT), 'no --name given'),
    (('tpu', '--name=t', EXPERIMENT), 'no --zone given'),
    ((*TPU, EXPERIMENT), 'gs://'),
    ((*TPU, '--spot=1', EXPERIMENT), '--spot takes no value'),
    ((*TPU, '--workdir=gs://b/r', str(launched.TINY)), 'outside of this folder'),
    ((*GKE, EXPERIMENT), 'gs://'),
    ((*GKE, '--topology=4x8x4', '--workdir=gs://b/r', EXPERIMENT), 'has no topology 4x8x4'),
    ((*GKE, '--topology=2x8', '--workdir=gs://b/r', EXPERIMENT), 'has no topology 2x8'),
    ((*GKE, '--topology=4by4', '--workdir=gs://b/r', EXPERIMENT), '--topology is 4by4'),
    ((*GKE, '--accelerator=tpu-v6e-slice', '--workdir=gs://b/r', EXPERIMENT), 'no topology 4x4x8'),
    (('gke', '--topology=4x4', EXPERIMENT), 'no --image given'),
    ((*GKE, '--topology=99999x4', '--workdir=gs://b/r', EXPERIMENT), '--topology is 99999x4'),
    (('hosts', '--processes=-3', EXPERIMENT), "--processes is '-3', not a whole number"),
    (('hosts', '--processes', '-3', EXPERIMENT), "--processes is '-3', not a whole number"),
    (('hosts', '--processes=99999999999999999999', EXPERIMENT), 'number from 1 to 9999999'),
    (('hosts', '--processes=2', '--port=70000', EXPERIMENT), 'not a whole number from 1 to 65535'),
    (('hosts', '--processes=2', '--port=-1', EXPERIMENT), "--port is '-1'"),
    (('hosts', '--processes=2', '--grace=0', EXPERIMENT), "--grace is '0'"),
    (('slurm', '--nodes=0', '--gpus-per-node=4', EXPERIMENT), "--nodes is '0'"),
    (('local', '-x', EXPERIMENT), 'unknown option -x of local'),
    (('local', '--workdir'), '--workdir has no value'),
    (('lokal', EXPERIMENT), 'unknown command lokal'),
    (('setup',), 'give EXTRAS'),
    (('setup', 'tpu,remot'), 'unknown extra remot'),
])  # fmt: skip
def test_mistakes_are_one_line(place, words, message):
    status, output, errors = place.launch(*words)
    assert (status, output) == (2, '')
    assert_one_line(errors, message)
    assert not place.calls()


NEEDED = {  # the least that a command takes, with what its values are
    'local': {}, 'hosts': {'processes': '1'}, 'slurm': {'nodes': '1', 'gpus-per-node': '1'},
    'tpu': {'name': 't', 'zone': 'z'}, 'gke': {'image': 'i', 'topology': '4x4x8'},
}  # fmt: skip
HOSTILE = 'a\'b"c$(touch {0})`touch {0}`;touch {0}&& #é🙂 \\ -x %j ${{HOME}} $HOME *'


def valued(place, command):
    """The options of a command that take a value."""
    _, output, _ = place.launch(command, '--help')
    named = set(re.findall(r'(?<![\w-])--([a-z-]+)', output)) - {'workdir', 'sweep'}
    others = {'detach', 'logs', 'stop', 'spot', 'internal-ip', 'dry-run'}
    return sorted(named - others - {'constraint'} | ({'constraint'} & named & {command == 'slurm'}))


@pytest.mark.parametrize('command', NEEDED)
def test_no_value_of_an_option_becomes_a_command(place, command):
    """Each option in turn: one line that refuses it, or a dry run that is what was asked for."""
    trap = place.folder / 'trap'
    workdir = 'gs://b/r' if command in ('tpu', 'gke') else place.workdir
    for option in valued(place, command):
        value = HOSTILE.format(trap)
        words = [f'--{k}={v}' for k, v in (NEEDED[command] | {option: value}).items()]
        status, output, errors = place.launch(
            command, *words, f'--workdir={workdir}', '--dry-run', EXPERIMENT
        )
        assert not trap.exists() and status in (0, 2), (option, errors)
        if status == 2:
            assert_one_line(errors, f'--{option}')
        else:
            assert value in shlex.split(output) or f'"{value}"' in output, (option, output)
    assert not place.calls('gcloud') + place.calls('sbatch') + place.calls('kubectl')


@pytest.mark.parametrize('command', NEEDED)
@pytest.mark.parametrize('where', ['flag', 'workdir', 'option'])
def test_a_control_character_is_refused(place, command, where):
    for character in ('\n', '\r', '\t', '\x1b', '\x7f', '\x85', '\u2028', '\u2029', '\ufeff'):
        value = f'a{character}#SBATCH --wrap=id'
        given = {'flag': f'--config.seed={value}', 'workdir': f'--workdir=/{value}',
                 'option': f'--name={value}'}[where]  # fmt: skip
        words = [f'--{k}={v}' for k, v in NEEDED[command].items()]
        order = (given, EXPERIMENT) if where != 'flag' else (EXPERIMENT, given)
        status, output, errors = place.launch(command, *words, *order)
        assert (status, output) == (2, ''), (character, errors)
        assert_one_line(errors, 'remove the control character from ')
    assert not place.calls()


@pytest.mark.parametrize('command', ['local', 'hosts', 'slurm', 'tpu'])
def test_hostile_flags_arrive_as_they_are(place, command):
    """Through every shell on the way: names of folders too, where the command can have them."""
    trap = place.folder / 'trap'
    flags = [f'--config.x={HOSTILE.format(trap)}', '--config.y=-n', '--config.z=']
    words = [f'--{k}={v}' for k, v in NEEDED[command].items()]
    workdir = f'{place.workdir} $(touch {trap.name}) \'é'
    if command == 'tpu':
        workdir, words = 'gs://b/r $(touch x)\'', [*words, '--type=v4-32']
    status, output, errors = place.launch(
        command, *words, f'--workdir={workdir}', EXPERIMENT, *flags
    )
    assert status == 0 and not trap.exists() and not (ROOT / trap.name).exists(), errors
    for call in runs(place):
        assert call[:7] == ['--config', EXPERIMENT, '--workdir', workdir, *flags]


def test_help_names_real_options(place):
    for command in ('local', 'hosts', 'slurm', 'tpu', 'gke'):
        status, output, _ = place.launch(command, '--help')
        named = set(re.findall(r'(?<![\w-])--[a-z-]+', output))
        assert status == 0 and {'--workdir', '--sweep', '--dry-run'} <= named
        for option in named - {'--sweep', '--constraint'}:
            _, _, errors = place.launch(command, f'{option}=')
            assert f'error: {option} ' in errors and 'unknown' not in errors, (command, option)


def test_help_starts_nothing(place):
    _, usage, _ = place.launch('help')
    for command in ('quickstart', 'test', 'setup'):
        for flag in ('--help', '-h'):
            assert place.launch(command, flag) == (0, usage, '')
    assert place.launch('hosts', '-h') == place.launch('hosts', '--help')


def test_the_lines_in_the_docs_run(place):
    text = ''.join((ROOT / name).read_text() for name in ('README.md', 'docs/running.md'))
    form = r'^ {4}bash launch\.sh (\w+) ((?:[^\n#]*\\\n)*[^\n#]*EXPERIMENT)'
    found = re.findall(form, text, re.M)
    assert {command for command, _ in found} >= {'local', 'hosts', 'slurm', 'tpu', 'gke'}
    for command, words in found:
        words = words.replace('EXPERIMENT', EXPERIMENT).replace('\\', '').split()
        status, _, errors = place.launch(command, '--dry-run', *words)
        assert status == 0, (command, words, errors)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'val': 4})


# hosts


def test_hosts_dry_run_is_what_runs(place):
    flags = ('--config.data.view.name=a "b"', '--config.model.patch_size=(2, 2)')
    words = ('hosts', '--processes=3', '--devices=2', '--port=1234')
    status, output, _ = place.run((*words, '--dry-run'), *flags)
    assert status == 0 and not place.workdir.exists()
    subprocess.run(['bash', '-c', output], cwd=ROOT, env=place.environment, check=True)
    dry = sorted(place.calls('vit_jax.main'))
    logs = [place.workdir / f'logs/process_{i}.log' for i in (1, 2)]
    assert [x.read_text() for x in logs] == ['1 trains\n1 ends\n', '2 trains\n2 ends\n']
    status, output, _ = place.run(words, *flags)
    assert (status, output) == (0, '0 trains\n0 ends\n')
    calls = place.calls('vit_jax.main')
    assert len(calls) == 6 and sorted(calls) == sorted(2 * dry)
    for i, call in enumerate(dry):
        assert call[5:] == [
            '--workdir', str(place.workdir), *flags, '--coordinator', 'localhost:1234',
            '--num_processes', '3', '--process_id', str(i),
            '--expect_processes', '3', '--expect_devices', '6',
        ]  # fmt: skip


@pytest.mark.parametrize('signum, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_hosts_pass_a_signal_on_once(place, signum, status):
    place.fail(python={str(i): [0, 60] for i in range(3)})
    process = place.start('hosts', '--processes=3', f'--workdir={place.workdir}', EXPERIMENT)
    place.wait(lambda: len(place.trainers()) == 3)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does: to all that are in its foreground
    else:
        process.send_signal(signum)
    assert finish(process) == (status, '0 trains\n0 saved\n', '')
    assert [place.signals(i) for i in range(3)] == [[signum]] * 3
    assert not place.trainers()


def test_hosts_end_with_the_first_that_failed(place):
    place.fail(python={'0': ['deaf', 60], '1': [7, 0.5], '2': [5, 1.5]})
    began = time.time()
    status, _, errors = place.run(('hosts', '--processes=3', '--grace=2'))
    assert status == 7 and 2 < time.time() - began < 55  # process 0 would take 60
    assert f'process 1 ended with status 7, see {place.workdir}/logs' in errors
    assert 'killed after 2 s: process 0' in errors
    assert not place.trainers()


def test_hosts_lose_their_launcher(place):
    place.fail(python={str(i): [0, 60] for i in range(2)})
    process = place.start('hosts', '--processes=2', f'--workdir={place.workdir}', EXPERIMENT)
    place.wait(lambda: len(place.trainers()) == 2)
    process.send_signal(signal.SIGHUP)  # the terminal is closed
    assert finish(process)[0] == 143
    assert [place.signals(i) for i in range(2)] == [[signal.SIGTERM]] * 2


@pytest.mark.slow
def test_hosts_really(folder, place):
    place.environment |= {'VIT_JAX_PYTHON': sys.executable}
    words = ('hosts', '--processes=2', '--devices=2', f'--workdir={place.workdir}',
             f'{launched.TINY}:{folder}', '--config.evals.val.batch_size=4')  # fmt: skip
    process = place.start(*words, '--config.steps=100000')
    place.wait(lambda: launched.last_step(place.workdir) >= 3)
    process.send_signal(signal.SIGTERM)
    status, output, _ = finish(process)
    assert status == 143 and 'Stopped and saved' in output
    (last,) = launched.checkpoints(place.workdir)[-1:]
    assert last >= launched.last_step(place.workdir) >= 3
    status, output, errors = place.launch(
        *words, f'--config.steps={last + 3}', '--allow_config_change'
    )
    assert status == 0, errors
    assert f'resumed at step {last}' in output
    result = json.loads((place.workdir / 'result.json').read_text())
    assert result['device_count'] == 4 and result['steps'] == last + 3


# slurm


def test_slurm_job(place):
    place.environment['XLA_FLAGS'] = '--xla_dump_to=here'
    place.fail(squeue='down')  # the controller does not answer once
    status, output, errors = place.run(
        (*SLURM, '--partition', 'gpu', '--time=2:00', '--exclusive=user'), '--config.seed=1'
    )
    assert (status, errors) == (0, '')
    assert output.startswith(f'# job 1, log {place.workdir}/logs/slurm-1.log\n')
    assert said(output) == ['0 trains', '0 ends']
    script = (place.workdir / 'logs/job.sbatch').read_text()
    given = dict(re.findall(r'^#SBATCH (--[a-z-]+)=?"?(.*?)"?$', script, re.MULTILINE))
    assert given['--nodes'] == '2' and given['--ntasks-per-node'] == given['--gpus-per-node'] == '4'
    assert given['--partition'] == 'gpu' and given['--exclusive'] == 'user'
    assert given['--signal'] == 'SIGTERM@120' and '--requeue' in given
    (srun,) = place.calls('srun')
    hiding, own = (place.folder / 'xla_flags').read_text().split()
    assert hiding.startswith('--xla_gpu_enable_latency_hiding') and own == '--xla_dump_to=here'
    # jax.distributed picks a device by SLURM_LOCALID: all of a node's have to be there.
    assert '--gpu-bind=none' in srun and not [w for w in srun if 'gpus-per-task' in w]
    assert srun[-6:] == ['vit_jax.main', '--config', EXPERIMENT, '--workdir', str(place.workdir),
                         '--config.seed=1']


@pytest.mark.slow
def test_slurm_dry_run_is_what_runs(place):
    status, output, _ = place.run((*SLURM, '--dry-run'), "--config.data.view.name=it's")
    assert status == 0 and not place.workdir.exists() and not place.calls()
    pasted = subprocess.run(['bash', '-c', output], cwd=ROOT, env=place.environment, check=True,
                            capture_output=True, text=True)
    assert pasted.stdout == '1\n'
    dry = (place.workdir / 'logs/job.sbatch').read_text()
    assert place.run(SLURM, "--config.data.view.name=it's")[0] == 0
    assert (place.workdir / 'logs/job.sbatch').read_text() == dry


def test_slurm_job_near_its_limit_queues_again(place):
    place.fail(python={'0': [0, 60]})
    process = place.start(*SLURM, f'--workdir={place.workdir}', EXPERIMENT)
    place.wait(place.trainers)
    (pid,) = place.trainers()
    place.fail()
    os.kill(pid, signal.SIGTERM)  # as --signal has it: to the processes, not to the script
    status, output, _ = finish(process)
    assert status == 0 and len(runs(place)) == 2
    assert len(place.calls('scontrol', 'requeue')) == 1 and output.count('0 trains') == 2


def test_slurm_interrupted_cancels(place):
    place.fail(python={'0': [0, 60]})
    process = place.start(*SLURM, f'--workdir={place.workdir}', EXPERIMENT)
    place.wait(place.trainers)
    process.send_signal(signal.SIGINT)
    status, _, errors = finish(process)
    assert (status, errors) == (130, '# cancelled job 1\n')
    assert place.calls('scancel') and not place.calls('scontrol') and not place.trainers()
    log = (place.workdir / 'logs/slurm-1.log').read_text()
    assert log.endswith('0 saved\n')  # the script waited for what it had started


def test_slurm_statuses(place):
    place.fail(python={'0': [3, 0]})
    assert place.run(SLURM)[0] == 3
    place.fail(sbatch='partition')
    status, _, errors = place.run((*SLURM, '--partition=nix'))
    assert status == 1
    assert_one_line(errors, 'Invalid partition name specified', 'sinfo -s')


# sweeps


def test_combinations():
    words = ['model.patch_size=(2, 4),8', 'optim.lr=1e-3']
    assert sweep.combinations(words) == [
        (('model.patch_size', '(2, 4)'), ('optim.lr', '1e-3')),
        (('model.patch_size', '8'), ('optim.lr', '1e-3')),
    ]
    assert sweep.folder((('init_from', 'gs://a/b'), ('seed', '-1'))) == 'init_from=gs_a_b,seed=-1'
    for bad in (['seed'], ['seed=1,'], ['seed=1,1'], ['seed=1', 'seed=2'], []):
        with pytest.raises(UserError):
            sweep.combinations(bad)


@pytest.fixture
def real(place):
    """A place where the run itself is real."""
    place.environment |= {'VIT_JAX_PYTHON': sys.executable}
    return place


def sweep_of(folder, real, command, *words):
    return (*command, f'--workdir={real.workdir}', f'{launched.TINY}:{folder}', *words,
            '--config.steps=6', '--config.checkpoint.every=3')  # fmt: skip


@pytest.mark.slow
def test_sweep(folder, real):
    words = ('--sweep', 'optim.lr=3e-3,1e38', 'seed=1,2')
    status, output, errors = real.launch(*sweep_of(folder, real, ('local',), *words))
    assert status == 3 and 'not finite' in errors  # one after another, a failure stops none
    runs = sorted(p.name for p in real.workdir.iterdir())
    assert runs == [f'optim.lr={lr},seed={seed}' for lr in ('1e38', '3e-3') for seed in (1, 2)]
    rows = [line.split() for line in output.splitlines()[-5:]]
    assert rows[0][:4] == ['optim.lr', 'seed', 'state', 'val/accuracy']
    loss = rows[0].index('val/loss')
    for row, seed in zip(rows[1:3], '12', strict=True):
        result = json.loads((real.workdir / f'optim.lr=3e-3,seed={seed}/result.json').read_text())
        assert row[:3] == ['3e-3', seed, 'finished']
        assert float(row[loss]) == pytest.approx(result['metrics']['val/loss'], rel=1e-3)
        config = json.loads((real.workdir / f'optim.lr=3e-3,seed={seed}/config.json').read_text())
        assert config['seed'] == int(seed) and config['optim']['lr'] == 3e-3
    assert [row[:3] for row in rows[3:]] == [['1e38', '1', 'step'], ['1e38', '2', 'step']]

    before = {p: p.stat().st_mtime_ns for p in real.workdir.rglob('*')}
    words = ('--sweep', 'optim.lr=3e-3', 'seed=2,1')
    status, output, _ = real.launch(*sweep_of(folder, real, ('local',), *words))
    assert status == 0 and output.count('finished') == 4  # what is finished is not run again
    assert before == {p: p.stat().st_mtime_ns for p in real.workdir.rglob('*')}


@pytest.mark.slow
def test_sweep_stopped_and_on_slurm(folder, real):
    words = ('--sweep', 'seed=1,2')
    process = real.start(*sweep_of(folder, real, ('local',), *words))
    first = real.workdir / 'seed=1'
    real.wait(lambda: launched.last_step(first) >= 1)
    os.killpg(process.pid, signal.SIGINT)
    status, output, _ = finish(process)
    assert status == 130 and [x.split()[:2] for x in output.splitlines()[-2:]] == [
        ['1', 'step'], ['2', 'not'],
    ]  # fmt: skip
    assert launched.checkpoints(first) and not (first / 'result.json').exists()
    status, output, errors = real.launch(*sweep_of(folder, real, SLURM, *words))
    assert status == 0, errors
    assert len(real.calls('sbatch')) == 2  # both submitted; the first goes on where it stopped
    assert [x.split()[:2] for x in output.splitlines()[-2:]] == [
        ['1', 'finished'], ['2', 'finished'],
    ]  # fmt: skip
    again = real.launch(*sweep_of(folder, real, SLURM, *words))
    assert again[0] == 0 and len(real.calls('sbatch')) == 2
    more = real.launch(*sweep_of(folder, real, SLURM, *words), '--config.optim.lr=1')
    assert more[0] == 2 and 'another config' in more[1]


@pytest.mark.slow
def test_sweep_checks_every_config_before_it_runs_one(folder, real):
    words = sweep_of(folder, real, ('local',), '--sweep', 'seed=1,2', 'optim.lrr=1')
    status, output, errors = real.launch(*words)
    assert (status, output) == (2, '') and not real.workdir.exists()
    assert_one_line(errors, 'unknown key optim.lrr; the nearest valid key is optim.lr')
