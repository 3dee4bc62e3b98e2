"""launch.sh tpu and gke, with stand-ins for gcloud and kubectl that fail as these do."""

import os
import re
import shlex
import signal

import pytest
import yaml
from launching import EXPERIMENT, GKE, TPU, assert_one_line, finish, runs

# tpu


def tpu(place, *words):
    return (*TPU, *words, '--workdir=gs://b/r', EXPERIMENT, '--config.seed=1')


@pytest.mark.slow
def test_tpu_is_made_set_up_and_run(place):
    status, output, errors = place.launch(*tpu(place, '--type=v4-32', '--spot'))
    assert (status, errors) == (0, ''), errors
    assert '# TPU t: requested\n' in output and output.endswith('0 trains\n0 ends\n')
    (create,) = place.calls('gcloud', 'create')
    assert {'--accelerator-type=v4-32', '--runtime-version=tpu-ubuntu2204-base', '--node-id=t',
            '--spot', '--zone=z'} <= set(create)
    assert runs(place) == [['--config', EXPERIMENT, '--workdir', 'gs://b/r', '--config.seed=1']] * 4
    pips = place.calls('python', 'pip')
    assert len(pips) == 4 and all('constraints.txt' in c and '.[tpu,remote]' in c for c in pips)
    assert place.launch(*tpu(place))[0] == 0  # all is there: nothing is made or installed again
    assert len(place.calls('gcloud', 'create')) == 1 and len(place.calls('python', 'pip')) == 4
    assert len(runs(place)) == 8


@pytest.mark.slow
def test_tpu_dry_run_is_what_runs(place):
    flag = '--config.data.view.name=it\'s "a b"'
    status, output, _ = place.launch(*tpu(place, '--type=v4-32', '--dry-run'), flag)
    assert status == 0 and not place.calls()
    dry = {tuple(shlex.split(x)) for x in output.splitlines() if x.startswith('gcloud')}
    assert place.launch(*tpu(place, '--type=v4-32'), flag)[0] == 0
    assert {c[-1] for c in runs(place)} == {flag}
    real = {tuple(c) for c in place.calls('gcloud')} - {
        tuple(c) for c in place.calls('gcloud', 'queued-resources', 'describe')
    }
    later = {c for c in real if re.search(r'worker.sh read [1-9]', c[-1])}
    assert later and real - later == dry and len(dry) == 7


def ready(place):
    """A TPU that is there, where every worker's run goes on until it is stopped."""
    place.fail(python={str(i): [0, 60] for i in range(4)})
    process = place.start(*tpu(place, '--type=v4-32'))
    place.wait(lambda: len(place.trainers()) == 4)
    return process


@pytest.mark.slow
def test_tpu_survives_its_launcher_and_is_found_again(place):
    process = ready(place)
    process.kill()
    finish(process)
    assert len(place.trainers()) == 4
    other = place.launch(*TPU, '--workdir=gs://b/other', EXPERIMENT)
    assert other[0] == 1 and 'this worker already runs' in other[2]
    place.wait(lambda: not place.trainers())


@pytest.mark.slow
def test_tpu_attaches_and_stops(place):
    ready(place).kill()
    again = place.start(*tpu(place))
    while again.stdout.readline() != '0 trains\n':
        pass
    assert len(runs(place)) == 4  # no second run beside the first
    status, output, _ = place.launch(*TPU, '--stop')
    assert status == 0 and len(re.findall(': 143$', output, re.MULTILINE)) == 4
    assert not place.trainers() and all(place.signals(i) == [15] for i in range(4))
    assert finish(again)[:2] == (143, '0 saved\n')


@pytest.mark.parametrize('signum, status', [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
])  # fmt: skip
def test_tpu_interrupted_stops_every_worker(place, signum, status):
    process = ready(place)
    process.send_signal(signum)
    assert finish(process)[0] == status
    assert not place.trainers() and all(place.signals(i) == [15] for i in range(4))


@pytest.mark.slow
def test_tpu_preempted_is_made_again(place):
    process = ready(place)
    for pid in place.trainers():
        os.killpg(os.getpgid(pid), signal.SIGKILL)  # the machines are gone
    place.fail(python={})
    place.put('tpu', 'PREEMPTED')
    status, output, errors = finish(process)
    assert status == 0, errors
    assert 'PREEMPTED; the run resumes' in errors and output.endswith('0 ends\n')
    assert len(place.calls('gcloud', 'create')) == len(place.calls('gcloud', 'delete')) + 1 == 2
    assert len(runs(place)) == 8 and runs(place)[0] == runs(place)[-1]


@pytest.mark.slow
def test_tpu_failures(place):
    place.fail(python={'0': [5, 0.5], '1': ['deaf', 60], '2': [0, 60], '3': [0, 60]})
    status, _, _ = place.launch(*tpu(place, '--type=v4-32', '--grace=1'))
    assert status == 5 and not place.trainers()  # the others were stopped, if need be killed
    place.fail(python={'3': [6, 0]})
    status, _, errors = place.launch(*tpu(place))
    assert status == 1 and ': 6\nerror: worker 0 of t succeeded, but the' in errors
    place.fail(ssh='unreachable 2')
    status, _, errors = place.launch(*tpu(place))
    assert status == 1 and 'cannot set up every worker of t: worker 2' in errors
    assert 'ssh-add' in errors and not place.trainers()


@pytest.mark.parametrize('fails, words, message', [
    (dict(create='quota'), ('--type=v4-32',), "Quota limit 'TPUV4PodPerProjectPerZoneForTPUAPI'"),
    (dict(create='quota'), ('--type=v4-32',), 'take another --zone'),
    (dict(room='none'), ('--type=v4-32',), 'the request for a v4-32 in z has failed'),
    (dict(gcloud='login'), (), 'gcloud auth login'),
    ({}, (), 'give --type'),
])  # fmt: skip
def test_tpu_that_can_not_be_had(place, fails, words, message):
    place.fail(**fails)
    status, _, errors = place.launch(*tpu(place, *words))
    assert status == 1 and not runs(place)
    assert_one_line(errors, message)


# gke


def manifest(place, *words):
    flags = [word for word in words if word.startswith('--config')] or ['--config.x=a "$(b)\\']
    words = [word for word in words if word not in flags]
    words = (*GKE, *words, '--workdir=gs://b/r', '--dry-run', EXPERIMENT, *flags)
    status, output, errors = place.launch(*words)
    assert status == 0, errors
    return yaml.safe_load(re.search("<<'END'\n(.*)\nEND\n", output, re.DOTALL)[1])


@pytest.mark.parametrize('words, hosts, chips, accelerator', [
    ((), 32, 4, 'tpu-v4-podslice'),
    (('--accelerator=tpu-v5p-slice', '--topology=2x2x1'), 1, 4, 'tpu-v5p-slice'),
    (('--topology=16x16',), 64, 4, 'tpu-v5-lite-podslice'),
    (('--topology=2x4', '--accelerator=tpu-v6e-slice'), 1, 8, 'tpu-v6e-slice'),
    (('--topology=2x4', '--chips-per-host=4'), 2, 4, 'tpu-v5-lite-podslice'),
    (('--topology=1x1',), 1, 1, 'tpu-v5-lite-podslice'),
])  # fmt: skip
def test_gke_manifest(place, words, hosts, chips, accelerator):
    spec = manifest(place, *words, '--spot', '--max-restarts=7', '--grace=99')['spec']
    assert spec['failurePolicy']['maxRestarts'] == 7
    (job,) = spec['replicatedJobs']
    job = job['template']['spec']
    pod = job['template']['spec']
    (container,) = pod['containers']
    assert job['parallelism'] == job['completions'] == hosts and job['backoffLimit'] == 0
    assert container['resources']['limits'] == {'google.com/tpu': chips}
    assert pod['nodeSelector']['cloud.google.com/gke-tpu-accelerator'] == accelerator
    topology = words[-1].split('=')[1] if 'topology' in str(words[-1:]) else None
    assert topology in (None, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'])
    assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true' and pod['tolerations']
    assert pod['terminationGracePeriodSeconds'] == 99 and pod['restartPolicy'] == 'Never'
    # Kubernetes would replace $(b); $$ is how it writes $.
    assert container['command'][-3:] == ['--workdir', 'gs://b/r', '--config.x=a "$$(b)\\']


def test_gke_values_are_what_they_were(place):
    """Quotes, backslashes and variables, as YAML and Kubernetes read them."""
    value = '--config.y=a: b # "c" \'d\' \\n $(POD) $$(POD) ${E} $ %s é🙂 - [x] {y} *z &a !t'
    (container,) = manifest(place, value)['spec']['replicatedJobs'][0]['template']['spec'][
        'template']['spec']['containers']  # fmt: skip
    assert container['command'][-1].replace('$$', '$') == value
    (secret,) = container['env']
    assert secret['name'] == 'VIT_JAX_JOB_SECRET' and re.fullmatch('[0-9a-f]{32}', secret['value'])


def gke(*words):
    return (*GKE, *words, '--workdir=gs://b/r', EXPERIMENT)


def test_gke_follows_to_the_end(place):
    place.put('after', 'Completed')
    status, output, errors = place.launch(*gke())
    assert (status, errors) == (0, '') and 'step 1/60\n' in output
    assert yaml.safe_load((place.folder / 'manifest').read_text())['metadata']['name'] == 'digits'
    place.put('after', 'Failed')
    place.fail(codes='143 2 0')
    status, _, errors = place.launch(*gke())
    assert status == 2 and place.calls('kubectl', 'delete')  # what has ended made room
    assert_one_line(errors, 'JobSet digits: Failed')


def test_gke_interrupted_deletes(place):
    process = place.start(*gke())
    place.wait(lambda: place.calls('kubectl', 'logs'))
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    assert place.calls('kubectl', 'delete') and not (place.folder / 'manifest').exists()


@pytest.mark.parametrize('how, message', [
    ('no CRD', 'kubectl apply --server-side'),
    ('not there', 'get-credentials'),
])
def test_gke_clusters_that_refuse(place, how, message):
    place.fail(kubectl=how)
    status, _, errors = place.launch(*gke())
    assert status == 1
    assert_one_line(errors, message)
