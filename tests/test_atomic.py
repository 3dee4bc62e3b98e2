"""A file or folder that is replaced is complete or as it was, with the permissions of the umask."""

import os
import pathlib
import stat

import pytest

from vit_jax.errors import UserError
from vit_jax.io import atomic, storage


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize('mask', [0o022, 0o077])
def test_a_file_is_replaced_when_the_block_ends(tmp_path, mask):
    path, before = tmp_path / 'a.bin', os.umask(mask)
    try:
        for sync in (False, True):
            with atomic.replace_file(path, sync) as part:
                part.write_bytes(b'new %d' % sync)
                assert not path.exists() or path.read_bytes() != part.read_bytes()
            assert path.read_bytes() == b'new %d' % sync
        storage.write(tmp_path / 'b.bin', b'bytes')
    finally:
        os.umask(before)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
    assert names(tmp_path) == ['a.bin', 'b.bin']


def test_content_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    path, calls = tmp_path / 'a.bin', []
    sync, rename = os.fsync, pathlib.Path.replace
    monkeypatch.setattr(os, 'fsync', lambda f: (calls.append('sync'), sync(f)))
    monkeypatch.setattr(
        pathlib.Path, 'replace', lambda a, b: (calls.append('rename'), rename(a, b))
    )
    storage.write(path, b'1', sync=True)
    assert calls == ['sync', 'rename']
    storage.write(path, b'2')
    assert calls == ['sync', 'rename', 'rename']


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_a_block_that_raises_changes_nothing(tmp_path, error):
    file, folder = tmp_path / 'file', tmp_path / 'folder'
    file.write_text('old')
    folder.mkdir()
    (folder / 'old').touch()
    for replace, path in ((atomic.replace_file, file), (atomic.replace_folder, folder)):
        with pytest.raises(type(error)), replace(path) as part:
            (part / 'new' if part.is_dir() else part).write_text('new')
            raise error
    assert names(tmp_path) == ['file', 'folder'] and names(folder) == ['old']
    assert file.read_text() == 'old'


@pytest.mark.parametrize('system', ['exchange', 'renames'])
def test_a_folder_is_replaced_when_the_block_ends(tmp_path, monkeypatch, system):
    if system == 'renames':
        monkeypatch.setattr(atomic.ctypes, 'CDLL', lambda *args, **options: object())
    for name in ('first', 'second'):
        with atomic.replace_folder(tmp_path / 'folder') as part:
            (part / name).write_text(name)
        assert names(tmp_path) == ['folder'] and names(tmp_path / 'folder') == [name]


def test_part_files_of_killed_processes_are_removed(tmp_path):
    pids = {'running': os.getppid(), 'dead': 2**22 + 1, 'mine': os.getpid(), 'huge': 10**30}

    def part(name, pid, host=None):
        return f'.{name}.{host or atomic.host()}.{pids[pid]}.part'

    for pid in pids:
        for name in ('a', 'b[c'):
            (tmp_path / part(name, pid)).touch()
    kept = ['.x.part', '.a.half.part', '.a.1.half.part', 'a.1.7.part', '.a.txt']
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / part('folder', 'dead') / 'inner').mkdir(parents=True)
    atomic.remove_leftovers(tmp_path, 'b[c')
    left = {part(name, pid) for name in ('a', 'b[c') for pid in pids}
    left -= {part('b[c', pid) for pid in ('dead', 'mine', 'huge')}
    assert set(names(tmp_path)) == {*left, *kept, part('folder', 'dead')}
    atomic.remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == {*kept, *(part(name, 'running') for name in ('a', 'b[c'))}
    atomic.remove_leftovers(tmp_path / 'missing')


def test_another_machine_with_the_same_process_ids_shares_a_folder(tmp_path, monkeypatch):
    """As containers have, whose first processes have the same ids."""
    path = tmp_path / 'a.bin'
    with atomic.replace_file(path) as part:
        part.write_bytes(b'ours')
        with monkeypatch.context() as there:
            there.setattr(atomic, 'host', lambda: 'there')
            storage.write(path, b'theirs')
            old = tmp_path / '.a.bin.7.part'  # of a version whose names have no machine
            old.touch()
            os.utime(old, (0, 0))
            atomic.remove_leftovers(tmp_path)
            assert names(tmp_path) == [part.name, 'a.bin']
    assert path.read_bytes() == b'ours' and names(tmp_path) == ['a.bin']


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=f'write {tmp_path}/file/x: Not a directory'):
        storage.write(tmp_path / 'file' / 'x', b'')
