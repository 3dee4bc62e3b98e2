"""Stand-ins for gcloud, sbatch and its kin, kubectl, and the Python that trains: NAME ARGUMENTS.

Each appends what it was given to $STAND_IN/calls.jsonl, does on this machine what the real one does
far away, and fails as the real one does where $STAND_IN/fails.json has {its name: how}.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

FOLDER = pathlib.Path(os.environ['STAND_IN'])
WORKERS = 4


def write(name, text):
    part = FOLDER / f'{name}.{os.getpid()}'
    part.write_text(text)
    part.rename(FOLDER / name)


def read(name):
    path = FOLDER / name
    return path.read_text() if path.exists() else None


def fails(name):
    return json.loads(read('fails.json') or '{}').get(name)


def error(text, status=1):
    print(text, file=sys.stderr)
    sys.exit(status)


def value(flag, args):
    return next(a.partition('=')[2] for a in args if a.startswith(flag + '='))


def python(args):
    """Trains for the others: says what it does, saves when asked to stop, ends as it was told.

    fails.json has {'python': {process: [status, seconds]}}; None: it goes on, 'deaf': it ignores
    signals. What is not training is done by the real Python.
    """
    if 'pip' in args:
        return
    if 'vit_jax.main' not in args:
        os.execv(sys.executable, [sys.executable, *args])
    me = re.search(r'\d+$', os.environ['HOME']) if '--process_id' not in args else None
    me = me[0] if me else args[args.index('--process_id') + 1] if '--process_id' in args else '0'
    status, seconds = (fails('python') or {}).get(me, [0, 0.3])

    def stop(signum, frame):
        with (FOLDER / f'signals_{me}').open('a') as file:
            print(signum, file=file)
        if status != 'deaf':
            time.sleep(0.3)  # it saves
            print(f'{me} saved', flush=True)
            os._exit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    write(f'{me}.pid', str(os.getpid()))
    print(f'{me} trains', flush=True)
    end = time.time() + (seconds if isinstance(status, int) else 60)
    while time.time() < end:
        time.sleep(0.02)
    print(f'{me} ends', flush=True)
    sys.exit(status)


def gcloud(args):
    """A zone with room for one TPU of four workers, whose homes are $STAND_IN/worker0 to 3."""
    group, verb = [a for a in args if a != '--quiet'][2:4]
    how = fails(verb) or fails('gcloud')
    prefix = f'ERROR: (gcloud.compute.tpus.{group}.{verb}) '
    node, queued = read('tpu'), read('queued')
    if how == 'quota':
        error(prefix + "RESOURCE_EXHAUSTED: Quota limit 'TPUV4PodPerProjectPerZoneForTPUAPI' has "
              'been exceeded. Limit: 32 in zone us-central2-b.')
    if how == 'login':
        error(prefix + 'You do not currently have an active account selected.')
    if verb == 'describe':
        state = node if group == 'tpu-vm' else queued
        if state is None:
            error(prefix + 'NOT_FOUND: Resource was not found')
        print(state)
        if group == 'queued-resources' and state == 'WAITING_FOR_RESOURCES':  # it is our turn
            write('queued', 'FAILED' if fails('room') else 'ACTIVE')
            if not fails('room'):
                make_tpu()
    elif verb == 'create':
        if queued is not None:
            error(prefix + 'ALREADY_EXISTS: Resource already exists')
        write('queued', 'WAITING_FOR_RESOURCES')
    elif verb == 'delete':
        (FOLDER / 'queued').unlink(missing_ok=group == 'tpu-vm')
        (FOLDER / 'tpu').unlink(missing_ok=True)
    elif node != 'READY':
        error(prefix + f'The TPU VM is not in state READY, it is {node}')
    else:
        chosen = value('--worker', args)
        chosen = range(WORKERS) if chosen == 'all' else [int(chosen)]
        connect(verb, args, chosen, how, prefix)


def make_tpu():
    for i in range(WORKERS):
        home = FOLDER / f'worker{i}'
        shutil.rmtree(home, ignore_errors=True)
        (home / 'vit_jax/.venv/bin').mkdir(parents=True)
        shutil.copy(shutil.which('python_stand_in'), home / 'vit_jax/.venv/bin/python')
    write('tpu', 'READY')


def connect(verb, args, chosen, how, prefix):
    """ssh and scp, to all chosen workers at once; the first status that is not 0."""
    for i in chosen:
        print(f'SSH: Attempting to connect to worker {i}...', file=sys.stderr)
        if how == f'unreachable {i}':
            for _ in range(9):
                print('Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].\n'
                      f'SSH: Attempting to connect to worker {i}...', file=sys.stderr)
    running = {}
    for i in chosen:
        if how != f'unreachable {i}':
            home = FOLDER / f'worker{i}'
            if verb == 'scp':
                source, target = [a for a in args if not a.startswith('--')][4:]
                shutil.copy(source, home / target.partition(':')[2])
            else:
                running[i] = subprocess.Popen(
                    ['bash', '-c', value('--command', args)], cwd=home,
                    env={k: v for k, v in os.environ.items() if k != 'VIT_JAX_PYTHON'}
                    | {'HOME': str(home)},
                )  # fmt: skip
    statuses = {i: process.wait() for i, process in running.items()}
    for i, status in statuses.items():
        if status and len(chosen) > 1:
            print(f'##### Command execution on worker {i} failed with exit status {status}. '
                  'Continuing.', file=sys.stderr)
    if how in {f'unreachable {i}' for i in chosen}:
        error(prefix + '[/usr/bin/ssh] exited with return code [255].', 255)
    sys.exit(next((status for status in statuses.values() if status), 0))


def sbatch(args):
    if fails('sbatch') == 'partition':
        error('sbatch: error: invalid partition specified: nix\n'
              'sbatch: error: Batch job submission failed: Invalid partition name specified')
    job = str(1 + len(list(FOLDER.glob('output_*'))))
    script = pathlib.Path(args[-1]).read_text()
    output = re.search(r'#SBATCH --output="(.*)"', script)[1].replace('%j', job)
    write(f'job_{job}', script)
    write(f'output_{job}', output)
    start(job)
    print(job)


def start(job):
    with open(read(f'output_{job}'), 'a') as log:
        process = subprocess.Popen(
            ['bash', str(FOLDER / f'job_{job}')], stdout=log, stderr=log, start_new_session=True,
            stdin=subprocess.DEVNULL, env=os.environ | {'SLURM_JOB_ID': job},
        )  # fmt: skip
    write(f'group_{job}', str(process.pid))


def srun(args):
    write('xla_flags', os.environ['XLA_FLAGS'])
    words = args[next(i for i, a in enumerate(args) if not a.startswith('-')):]
    os.execvp(words[0], words)


def alive(job):
    """Whether its script runs; where that has ended SLURM kills what it has left."""
    script = int(read(f'group_{job}'))
    try:
        if pathlib.Path(f'/proc/{script}/stat').read_text().split(') ')[1][0] != 'Z':
            return True
    except FileNotFoundError:
        pass
    try:
        os.killpg(script, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return False


def squeue(args):
    if fails('squeue') and not read('squeue'):
        write('squeue', 'was down once')
        error('slurm_load_jobs error: Unable to contact slurm controller (connect failure)')
    job = value('--jobs', args)
    if not alive(job):
        error('slurm_load_jobs error: Invalid job id specified')
    print('RUNNING')


def scancel(args):
    if alive(args[0]):
        os.killpg(int(read(f'group_{args[0]}')), signal.SIGTERM)


def scontrol(args):
    start(args[1])  # the old script ends while the new one begins, and the new one is what counts


def kubectl(args):
    how = fails('kubectl')
    args = [a for a in args if not a.startswith('--namespace')]
    if how == 'no CRD' and 'get' in args:
        error('error: the server doesn\'t have a resource type "jobset"')
    if how == 'no CRD':
        error('error: resource mapping not found for name: "x" namespace: "" from "m": no matches '
              'for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"\n'
              'ensure CRDs are installed first')
    if how == 'not there':
        error('The connection to the server localhost:8080 was refused - did you specify the right '
              'host or port?')
    if args[0] == 'apply':
        write('manifest', pathlib.Path(args[2]).read_text())
        write('terminal', '')
        print('jobset.jobset.x-k8s.io/x created')
    elif args[:2] == ['get', 'jobset']:
        if read('terminal') is None and '--ignore-not-found' not in args:
            error('Error from server (NotFound): jobsets.jobset.x-k8s.io "x" not found')
        print(read('terminal') or '', end='')
        if 'not' not in ' '.join(args) and read('after'):
            write('terminal', read('after'))  # it ends between two looks
    elif args[:2] == ['get', 'pods']:
        print(fails('codes') if 'exitCode' in args[-1] else 'x-hosts-0-0-abcde Running')
    elif args[0] == 'logs':
        print('step 1/60')
    elif args[0] == 'delete':
        for name in ('manifest', 'terminal'):
            (FOLDER / name).unlink(missing_ok=True)


if __name__ == '__main__':
    name, arguments = sys.argv[1], sys.argv[2:]
    with (FOLDER / 'calls.jsonl').open('a') as file:
        print(json.dumps([name, *arguments]), file=file)
    globals()[name](arguments)
