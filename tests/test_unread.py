"""Whatever a reader raises is one example less, named; what was trained until then is saved."""

import errno
import io
import shutil
import struct
import zlib

import aiohttp
import feeds
import launched
import numpy as np
import processes
import pytest
from PIL import Image

from vit_jax.data import images, pipeline, reading, sources
from vit_jax.data.prepare import worker
from vit_jax.data.readers.record import Record
from vit_jax.data.tasks import classify
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError

ERRORS = [
    OSError(errno.EIO, 'Input/output error'), FileNotFoundError(errno.ENOENT, 'No such file', 'x'),
    PermissionError(errno.EACCES, 'Permission denied'), OSError('odd'), struct.error('unpack'),
    zlib.error('deflate'), KeyError('image'), IndexError(), AttributeError('x'), MemoryError(),
    RuntimeError('a parser\nof two lines'), TimeoutError(), EOFError(), RecursionError(),
    UnicodeDecodeError('utf-8', b'x', 0, 1, 'no'), AssertionError(), aiohttp.ClientError('gone'),
]  # fmt: skip


class Records:
    """Nine examples of real images, the fifth of which raises."""

    def __init__(self, source, error, nameless=False):
        self.source, self.error, self.nameless = source, error, nameless

    def __len__(self):
        return 9

    def __getitem__(self, i):
        if i == 4:
            raise self.error
        return self.source.records[i]

    def name(self, i):
        if self.nameless:
            raise self.error
        return f'shard[{i}]'


@pytest.fixture
def source(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 3, 'val': 1})
    return sources.load(name=str(folder))


@pytest.mark.parametrize('error', ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_reader_raises_is_an_example_less(source, error):
    options = dict(view='resize', image_size=8, batch_size=9, threads=1)
    for nameless, called in ((False, r'shard\[4\]'), (True, 'example 4')):
        bad = sources.Source(Records(source, error, nameless), source.classes)
        (batch,) = feeds.examples(bad, tolerance=1 / 9, **options)
        np.testing.assert_array_equal(batch['mask'], np.arange(9) != 4)
        with pytest.raises(UserError, match=f'^{called}: cannot be read: .*1 of 9 examples'):
            next(feeds.batches(bad, 0, **options))
    (batch,) = feeds.examples(source, **options)
    assert batch['mask'].all()


@pytest.mark.parametrize('error', ERRORS, ids=lambda error: type(error).__name__)
def test_what_prepare_can_not_read_counts_as_unreadable(source, error):
    bad = sources.Source(Records(source, error), source.classes)
    with pytest.raises(images.Unreadable):
        worker.read_example(bad, 4)
    assert worker.read_example(bad, 3) == (*source.records[3].values(), {})


def test_a_mistake_in_a_view_is_none_of_the_data(source):
    def read(record, rng):
        raise ZeroDivisionError('a mistake')

    task = classify.classify(source, view='resize', image_size=8)._replace(read=read)

    with pytest.raises(ZeroDivisionError):
        reading.example(0, None, source=source, task=task)


def test_examples_made_in_a_batch_are_those_made_alone(tmp_path):
    whole = launched.write_images(tmp_path / 'images', {'train': 2, 'val': 1})
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    for quality in (90, 95):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, 'JPEG', quality=quality)
        data = file.getvalue()
        name = next((whole / 'train').iterdir()) / f'{quality}'
        for kind, part in (('whole', data), ('cut', data[:2000]), ('lacks_end', data[:-2])):
            name.with_name(f'{quality}_{kind}.jpg').write_bytes(part)
    source = sources.load(name=str(whole))
    for view, augment in (('resize', ()), (dict(name='fit'), ()), ('resize', ('solarize',))):
        task = classify.classify(source, view=view, image_size=24, augment=augment)
        rows = np.arange(len(source))
        batch = pipeline.evaluation_batch(
            0, source=source, task=task, batch_size=len(source), rows=rows
        )
        assert (batch['mask'] == 0).sum() == 2 and not batch['image'][batch['mask'] == 0].any()
        rng = np.random.default_rng(0)
        for i in rows.tolist():
            alone = reading.example(i, rng, source=source, task=task)
            for key, value in alone.items():
                np.testing.assert_array_equal(batch[key][i], value)


@pytest.mark.parametrize('size, most', [(10, 32), (10**7, 1), (2**22, 2)])
def test_several_records_are_read_at_once_within_bounds(size, most):
    image = bytes(size)
    for record in ({'image': image}, Record({'image': image})):
        read, held, groups = [], [], []

        def load(k, record=record, read=read):
            read.append(k)
            return record, ''

        for group in pipeline.grouped(load, 70):
            assert read[-len(group) :] == [k for k, _ in group]
            held.append(len(group))
            groups += [k for k, _ in group]
        assert groups == list(range(70)) and max(held) == most


def test_other_processes_get_every_batch_of_an_evaluation(source):
    stop = Stop()
    stop.shared = True
    bad = sources.Source(Records(source, OSError('gone')), source.classes)
    feed = feeds.examples(bad, view='resize', image_size=8, batch_size=2, threads=1, stop=stop)
    batches = [(stop.add_vote(batch), stop.trouble) for batch in feed]
    assert [trouble is not None for _, trouble in batches] == [False, False, True, True, True]
    assert isinstance(stop.trouble, UserError) and 'shard[4]' in str(stop.trouble)
    for batch, trouble in batches:
        assert batch['mask'].all() == (trouble is None)
        assert batch['stop'].tolist() == [trouble is not None] * 2
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: (v.shape, v.dtype) for k, v in batches[0][0].items()
        }


FOREVER = ('--config.steps=1000000', '--config.checkpoint.every=0', '--config.report.every=1')


def deleted(folder):
    shutil.rmtree(folder)


def dangling(folder):
    for file in folder.rglob('*.png'):
        link = file.with_suffix('.new')
        link.symlink_to('/nowhere')
        link.rename(file)


@pytest.mark.parametrize('part, loss, workers', [
    ('train', deleted, 0), pytest.param('train', dangling, 1, marks=pytest.mark.slow),
    pytest.param('val', deleted, 0, marks=pytest.mark.slow),
    pytest.param('val', dangling, 1, marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.slow
def test_images_that_go_away_lose_nothing_that_was_trained(part, loss, workers, tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 8})
    every = 3 if part == 'val' else 0
    flags = (*FOREVER, f'--config.evals.val.every={every}', f'--config.data.workers={workers}',
             f'--config.evals.val.workers={workers if part == "val" else 0}')  # fmt: skip
    workdir = tmp_path / 'run'
    process = launched.start(folder, workdir, *flags)
    launched.wait_for(lambda: launched.last_step(workdir) > 7, process, workdir)
    loss(folder / part)
    assert process.wait(timeout=300) == 2, launched.log_of(workdir).read_text()
    said = launched.log_of(workdir).read_text()
    assert 'Traceback' not in said
    (line,) = [line for line in said.splitlines() if line.startswith('error: ')]
    assert line.startswith(f'error: {folder / part}/') and 'No such file or directory' in line
    assert launched.checkpoints(workdir) == [launched.last_step(workdir)]
    assert launched.last_step(workdir) > 7


MISTAKEN = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import tiny
from ml_collections import ConfigDict
from vit_jax.data import augment

def mistaken(shape, rng, *, size):
    if pathlib.Path({sign!r}).exists():
        raise ZeroDivisionError('a mistake')
    return augment.resize(shape, rng, size=size)

augment.VIEWS['mistaken'] = mistaken

def get_config():
    config = tiny.get_config({folder!r})
    config.data.view = ConfigDict(dict(name='mistaken'))
    return config
"""


@pytest.mark.slow
def test_a_mistake_in_a_view_ends_in_a_traceback_and_loses_nothing(tmp_path):
    folder = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 1})
    sign, workdir, config = (tmp_path / name for name in ('sign', 'run', 'config.py'))
    tests = str(launched.TINY.parent)
    config.write_text(MISTAKEN.format(tests=tests, sign=str(sign), folder=str(folder)))
    flags = (f'--config={config}', *FOREVER, '--config.evals.val.every=0')
    process = launched.start(folder, workdir, *flags)
    launched.wait_for(lambda: launched.last_step(workdir) > 7, process, workdir)
    sign.touch()
    assert process.wait(timeout=300) == 1
    assert 'ZeroDivisionError: a mistake' in launched.log_of(workdir).read_text()
    assert launched.checkpoints(workdir) == [launched.last_step(workdir)]


@pytest.mark.slow
def test_an_evaluation_that_one_process_can_not_read_ends_all_and_loses_nothing(tmp_path):
    folder, workdir = launched.write_images(tmp_path / 'images', {'train': 8, 'val': 8}), tmp_path
    flags = (*FOREVER, '--config.evals.val.every=3', '--config.evals.val.batch_size=8')
    with processes.Run(folder, workdir / 'run', 2, 1, *flags) as run:
        run.wait_for(lambda: launched.last_step(workdir / 'run') > 7)
        (folder / 'val' / 'bee' / '3.png').unlink()  # in a row of one of the two
        assert run.ended() == {0: 2, 1: 2}, run.says()
        for i in range(2):
            assert any('bee/3.png: cannot be read' in error for error in run.errors(i)), run.says()
    saved, last = launched.checkpoints(workdir / 'run'), launched.last_step(workdir / 'run')
    assert saved == [last] and last > 7
