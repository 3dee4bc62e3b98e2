"""Memory of commands on CPUs in pages of 2 MiB."""

import os
import subprocess
import sys
import textwrap

import pytest

from vit_jax.io import large_pages

SETTING = 'glibc.malloc.hugetlb=1'


@pytest.fixture
def on_linux(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(large_pages, 'ACCELERATORS', ())
    for name in (large_pages.NAME, 'JAX_PLATFORMS'):
        monkeypatch.delenv(name, raising=False)


def test_variables_follow_the_device_and_the_user(on_linux, monkeypatch, tmp_path):
    assert large_pages.variables() == {large_pages.NAME: SETTING}
    device = tmp_path / 'nvidia0'
    device.touch()
    monkeypatch.setattr(large_pages, 'ACCELERATORS', (f'{tmp_path}/nvidia[0-9]*',))
    assert large_pages.variables() == {}
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    monkeypatch.setenv(large_pages.NAME, 'glibc.malloc.check=3')
    assert large_pages.variables() == {large_pages.NAME: f'glibc.malloc.check=3:{SETTING}'}
    monkeypatch.setenv(large_pages.NAME, 'glibc.malloc.hugetlb=0')
    assert large_pages.variables() == {}
    monkeypatch.delenv(large_pages.NAME)
    monkeypatch.setenv('JAX_PLATFORMS', 'tpu,cpu')
    assert large_pages.variables() == {}


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc on Linux reads the variable')
def test_a_command_restarts_once_as_the_same_process(tmp_path):
    """Python runs sitecustomize at each start of an interpreter."""
    (tmp_path / 'sitecustomize.py').write_text(textwrap.dedent("""
        import os, sys
        print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), *sys.orig_argv[1:])
    """))
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    environment = os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'}
    environment.pop(large_pages.NAME, None)
    words = ['-W', 'ignore', '-m', 'vit_jax.of_no_name', '--flag=a b']
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=200
    )
    first, second = (line.split(' ', 2) for line in done.stdout.splitlines())
    assert first[0] == second[0]
    assert [first[1], second[1]] == ['None', SETTING]
    assert first[2] == second[2] == ' '.join(words)
    assert done.returncode == 1 and 'No module named vit_jax.of_no_name' in done.stderr


def started(tmp_path, site, words):
    """What a command prints whose interpreter runs `site` at each start."""
    (tmp_path / 'sitecustomize.py').write_text(textwrap.dedent(site))
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    environment = os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'}
    for name in (large_pages.NAME, large_pages.RESTARTED):
        environment.pop(name, None)
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc on Linux reads the variable')
def test_a_command_restarts_once_where_the_variable_is_removed(tmp_path):
    """As glibc removes it for an interpreter with capabilities."""
    done = started(tmp_path, """
        import os
        os.environ.pop('GLIBC_TUNABLES', None)
        with open(os.path.join(os.path.dirname(__file__), 'starts'), 'a') as file:
            file.write('x')
            assert file.tell() < 10
    """, [sys.executable, '-m', 'vit_jax.of_no_name'])
    assert (tmp_path / 'starts').read_text() == 'xx'
    assert done.returncode == 1 and 'No module named vit_jax.of_no_name' in done.stderr


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc on Linux reads the variable')
def test_a_command_goes_on_where_it_cannot_restart(tmp_path):
    site = f"""
        import sys
        sys.executable = {str(tmp_path / 'gone')!r}
    """
    done = started(tmp_path, site, [sys.executable, '-m', 'vit_jax.of_no_name'])
    assert done.returncode == 1 and 'No module named vit_jax.of_no_name' in done.stderr


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc on Linux reads the variable')
@pytest.mark.parametrize('words, restarts', [
    (['-um', 'vit_jax.of_no_name'], True), (['-W', 'ignore', '-Xdev', '-mvit_jax.x'], True),
    (['-m', 'pytest', '--version', '-p', 'vit_jax', '-m', 'vit_jax.x'], False),
    (['-c', 'import vit_jax', '-m', 'vit_jax.x'], False),
])  # fmt: skip
def test_commands_restart_however_the_option_is_written_and_others_do_not(
    words, restarts, tmp_path
):
    site = """
        import os
        print('start', os.environ.get('GLIBC_TUNABLES'))
    """
    done = started(tmp_path, site, [sys.executable, *words])
    found = [line for line in done.stdout.splitlines() if line.startswith('start')]
    assert found == ['start None', f'start {SETTING}'][: 1 + restarts]
