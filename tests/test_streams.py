"""Output that nobody reads, closed streams, early signals: real processes."""

import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import textwrap

import launched
import pytest

PACKAGE = pathlib.Path(launched.__file__).parent.parent / 'vit_jax'
COMMANDS = sorted(
    '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts).removesuffix('.__main__')
    for path in PACKAGE.rglob('*.py')
    if re.search(r'^    cli\.run\(', path.read_text(), re.MULTILINE)
)
SCRIPT = """
    import sys
    from vit_jax import cli

    def main(argv):
        with open('data', 'w') as data, open('more', 'w') as more:
            assert min(data.fileno(), more.fileno()) > 2
            for i in range(50_000):
                print('line', i)
                data.write(f'{i}\\n')
            print('words', file=sys.stderr)
        return 0

    cli.run(main, goes_on=len(sys.argv) > 1)
"""


@pytest.fixture
def script(tmp_path):
    """A command that prints much and writes files; with an argument, it goes on without output."""
    (tmp_path / 'script.py').write_text(textwrap.dedent(SCRIPT))
    return f'{sys.executable} script.py'


def shell(text, folder):
    """(exit status, stderr) of a command line; a process that hangs fails the test."""
    environment = launched.ENVIRONMENT | {'PYTHONPATH': str(PACKAGE.parent)}
    done = subprocess.run(
        ['bash', '-c', text], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        cwd=folder, env=environment, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stderr


LOST = {
    '| head -1': 'Broken pipe', '>&-': 'Bad file descriptor',
    '>/dev/full': 'No space left on device',
}  # fmt: skip


@pytest.mark.parametrize('where', [*LOST, '2>&-', '2>/dev/full', '>&- 2>&- <&-', '2>&1 | true'])
def test_a_command_goes_on_without_its_output(where, script, tmp_path):
    said = f'standard output: {LOST.get(where)}; going on without it\n'
    for argument in ('', 'goes_on'):
        status, stderr = shell(f'set -o pipefail; {script} {argument} {where}', tmp_path)
        assert (tmp_path / 'data').read_text() == ''.join(f'{i}\n' for i in range(50_000))
        assert (tmp_path / 'more').read_text() == ''
        refused = where.startswith('>') and not argument  # a pipe that is closed is no mistake
        assert status == (2 if refused else 0), stderr
        lines = stderr.splitlines(keepends=True)
        if where in LOST:
            line = f'error: cannot write to standard output: {LOST[where]}\n'
            told = [said] if argument else [line] if refused else []
            assert sorted(lines) == sorted(['words\n', *told])
        elif 'head' not in where:
            assert lines == []


@pytest.mark.slow
def test_a_run_trains_and_saves_without_its_output(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 5})
    results = []
    for i, where in enumerate(['>/dev/null', '| head -3', '>&- 2>&-']):
        words = launched.command(folder, tmp_path / f'{i}', '--config.steps=12')
        status, stderr = shell(f'set -o pipefail; {" ".join(words)} {where}', tmp_path)
        assert status == 0, stderr
        assert stderr.count('\n') == (1 if 'head' in where else 0), stderr
        results.append(json.loads((tmp_path / f'{i}' / 'result.json').read_text())['steps'])
        launched.assert_same_bits(*(launched.state(tmp_path / f'{n}', 12) for n in (0, i)))
        assert launched.timeless(tmp_path / f'{i}') == launched.timeless(tmp_path / '0')
    assert results == [12] * 3


@pytest.mark.slow
def test_a_run_outlives_its_terminal_and_says_so(tmp_path):
    folder, run = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 5}), tmp_path / 'r'
    terminal, end = os.openpty()  # of no session, so that no SIGHUP comes
    with (tmp_path / 'said').open('w') as said:
        process = subprocess.Popen(
            launched.command(folder, run), stdin=end, stdout=end, stderr=said,
            env=launched.ENVIRONMENT,
        )  # fmt: skip
    os.close(end)
    while launched.last_step(run) < 3:  # with a progress bar
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    assert process.wait(timeout=120) == 0 and launched.checkpoints(run)[-1] == 60
    said = (tmp_path / 'said').read_text()
    assert said == 'standard output: Input/output error; going on without it\n'


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_imports_ends_a_command_without_a_traceback(signum, tmp_path):
    assert len(COMMANDS) > 9
    for name in ('absl', 'jax', 'numpy'):  # what is imported first, but it takes for ever
        (tmp_path / f'{name}.py').write_text(
            "import time\nprint('imports', flush=True)\ntime.sleep(300)\n"
        )
    environment = launched.ENVIRONMENT | {'PYTHONPATH': f'{tmp_path}:{PACKAGE.parent}'}
    for command in COMMANDS:
        process = subprocess.Popen(
            [sys.executable, '-m', command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        assert process.stdout.readline() == 'imports\n'
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + signum, command
        assert stderr == f'{signal.Signals(signum).name}: ended\n'


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_a_command(signum, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent("""
        import time
        from vit_jax import cli

        def main(argv):
            try:
                print('works', flush=True)
                time.sleep(300)
            finally:
                print('tidied')

        cli.run(main)
    """))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=launched.ENVIRONMENT | {'PYTHONPATH': str(PACKAGE.parent)},
    )  # fmt: skip
    assert process.stdout.readline() == 'works\n'
    process.send_signal(signum)
    assert process.communicate(timeout=60) == ('tidied\n', 'interrupted\n')
    assert process.returncode == 128 + signum


def test_an_import_changes_neither_signals_nor_streams(tmp_path):
    (tmp_path / 'other').mkdir()
    text = """
        import signal, sys
        streams = sys.stdout, sys.stderr
        import vit_jax
        from vit_jax import cli
        from vit_jax.io import streams as ours
        assert (sys.stdout, sys.stderr) == streams
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    """
    for name in ('__init__.py', '__main__.py'):
        (tmp_path / 'other' / name).write_text(textwrap.dedent(text))
    environment = os.environ | {'PYTHONPATH': f'{tmp_path}:{PACKAGE.parent}'}
    subprocess.run([sys.executable, '-m', 'other', 'vit_jax.main'], env=environment, check=True)


def test_a_warning_is_one_line(tmp_path):
    """Whatever a library has made of logging before, as Orbax does when it is imported."""
    (tmp_path / 'script.py').write_text(textwrap.dedent("""
        import logging as standard
        from absl import logging
        from vit_jax import cli

        standard.basicConfig()
        cli.run(lambda argv: logging.warning('of note'))
    """))
    status, errors = shell(f'{sys.executable} script.py', tmp_path)
    assert status == 0 and errors.count('of note') == 1, errors
