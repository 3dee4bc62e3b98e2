"""Checkpoints of a run: saved by Orbax in the background, verified bit by bit when restored."""

import asyncio
import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from typing import Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vit_jax.errors import Lost, UserError
from vit_jax.io import storage
from vit_jax.io.bounds import NonNegative, Positive
from vit_jax.io.text import finite, printable
from vit_jax.optim import leaf_name
from vit_jax.run import history
from vit_jax.run.fingerprints import (
    Contents,
    ContentsRestore,
    ContentsSave,
    contents,
    named,
    start_fingerprint,
)

REFUSALS = (  # of a file system; the libraries raise them as exceptions of several types
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR, errno.ENOENT, errno.EISDIR, errno.EMFILE, errno.ENFILE, errno.ESTALE,
    errno.ENODEV, errno.ENXIO, errno.ENOMEM, errno.ELOOP, errno.ENAMETOOLONG, errno.ETIMEDOUT,
)  # fmt: skip


class Damaged(Exception):
    """A checkpoint whose arrays differ from those that were saved."""


class Checkpoints:
    """Saves, keeps and restores the checkpoints of a run, in its folder `checkpoints`.

    Arrays are written in the background while training continues.

    Args:
      every: steps between two checkpoints. 0: one checkpoint, at the end of the run.
      keep: how many of the latest checkpoints to keep.
      keep_every: also keep the checkpoints of all multiples of this step. None: no others.
      best: metric by which to keep the best checkpoint too, such as 'test/accuracy'.
      mode: whether the largest or the smallest value of `best` is the best. None: as the evaluator
        declares.
    """

    def __init__(
        self,
        workdir,
        read_only=False,
        *,
        every: NonNegative[int] = 1000,
        keep: Positive[int] = 2,
        keep_every: Positive[int] | None = None,
        best: str | None = None,
        mode: Literal['max', 'min'] | None = None,
    ):
        self.every, self.keep, self.keep_every = every, keep, keep_every
        self.best, self.mode, self.read_only = best, mode, read_only
        self.path = epath.Path(workdir) / 'checkpoints'
        self.saving, self.scores = None, {}  # the step that this object saved last
        quieten()
        with storage.explained(self.path, 'read'):
            self.manager = ocp.CheckpointManager(
                self.path,
                options=ocp.CheckpointManagerOptions(
                    read_only=read_only, create=not read_only,
                    cleanup_tmp_directories=not read_only,
                    save_interval_steps=0 if read_only else 1, preservation_policy=self,
                    # Else Orbax' threads wait 300 s for a folder that can't be created.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
                # Compression saves a twelfth of the bytes and takes twice as long.
                item_handlers={
                    'state': ocp.PyTreeCheckpointHandler(use_compression=False),
                    'contents': Contents(),
                },
            )  # fmt: skip
        self.known = {} if read_only else history.read_scores(self.path)  # {step: {metric: value}}
        # If scores are lost, any of the checkpoints may be the best one.
        lost = best is not None and not self.known and history.has_lost(workdir)
        self.protected = self.steps() if lost else ()

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        try:
            with self.explained(self.saving), contextlib.closing(self.manager):
                if not self.read_only:
                    self.manager.wait_until_finished()
            if kind and not self.read_only:
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(self.path)
        except Exception as e:
            if not kind:
                raise
            told = str(exception[0])  # the block's error, which may have the same reason
            if not any(os.strerror(n) in told and os.strerror(n) in str(e) for n in REFUSALS):
                print(printable(e), file=sys.stderr, flush=True)

    def steps(self):
        """Steps of the checkpoints, ascending."""
        return sorted(self.manager.all_steps())

    def due(self, step):
        return self.every > 0 and step % self.every == 0

    def save(self, step, state, scores):
        """Starts to save `state`; its arrays may be donated as soon as this returns.

        `scores` is {step: value of the metric `best`}, for values that `score` was not given.
        """
        kept = {s: values[self.best] for s, values in self.known.items() if self.best in values}
        self.scores = kept | scores
        self.finish()
        if step in self.steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), contents=ContentsSave(start_fingerprint(state))
        )
        with self.explained(step):
            check_space(self.path, state)
            self.manager.save(step, args=args, force=True)
        self.saving = step

    def score(self, step, found):
        """Keeps the results of an evaluation, {metric: value}, in a file beside the checkpoints."""
        self.known.setdefault(step, {}).update(finite(found))
        steps = self.steps()
        newest = max(steps, default=0)  # a step that was just evaluated may be saved later
        self.known = {s: v for s, v in self.known.items() if s in steps or s >= newest}
        if jax.process_index() == 0:
            history.write_scores(self.path, self.known)

    def finish(self):
        """Waits until the checkpoint in the background is written."""
        with self.explained(self.saving):
            self.manager.wait_until_finished()

    def should_preserve(self, checkpoints, *, context):
        """Which checkpoints Orbax keeps; it deletes the others once a new one is complete."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = to_keep(
            steps, self.scores, keep=self.keep, keep_every=self.keep_every,
            largest=self.mode != 'min', protected=self.protected,
        )  # fmt: skip
        return [step in kept for step in steps]

    @contextlib.contextmanager
    def explained(self, step):
        """Turns an error of the file system into UserError."""
        path = self.path if step is None else self.path / str(step)
        try:
            with storage.explained(path, 'write checkpoint'):
                yield
        except UserError:
            raise
        except Exception as e:  # OSError, or TensorStore's ValueError with the reason in its text
            gone = os.strerror(errno.ENOENT)  # which TensorStore and Orbax word differently
            text = re.sub('NOT_FOUND|missing .zarray|No ArrayMetadata', gone, f'{e} {e.__cause__}')
            for refused in map(os.strerror, REFUSALS):
                if refused in text:
                    why = f'{refused}; what was saved before is as it was'
                    raise UserError(f'can not write checkpoint {path}: {why}') from e
            raise

    def restore(self, step, abstract):
        """The state saved at `step`, with the shardings of `abstract`; raises Damaged."""
        try:
            kept = self.manager.restore(
                step, args=ocp.args.Composite(contents=ContentsRestore())
            ).contents
        except Exception as e:  # anything that the libraries raise for a broken file
            raise unreadable(self.path / str(step), 'its list of arrays', e) from e
        wanted = {n: [list(x.shape), str(x.dtype)] for n, x in named(abstract).items()}
        for name in sorted(wanted.keys() | kept.keys()):
            if kept.get(name, [])[:2] != wanted.get(name, []):
                raise UserError(
                    f'checkpoint {self.path / str(step)} does not fit the config: {name} is '
                    f'{kept.get(name, ["absent"])[:2]} there and {wanted.get(name, "absent")} here'
                )
        places = ocp.checkpoint_utils.construct_restore_args(abstract)
        try:
            state = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, places))
            ).state
        except Exception as e:
            raise unreadable(self.path / str(step), 'its arrays', e) from e
        for name, found in contents(state).items():
            if found != kept[name]:
                raise Damaged(f'the bits of {name} are not those that were saved')
        return state

    def resume(self, abstract):
        """The newest intact state, or None in a new run; reports and renames damaged ones.

        One of several processes can't fall back to an older checkpoint by itself, as the others may
        have read their parts of the newest: it raises Lost, and the next start finds the older one.
        """
        bad, steps = [], self.steps()
        for step in reversed(steps):
            try:
                state = self.restore(step, abstract)
            except Damaged as e:
                message = f'checkpoint {self.path / str(step)} is damaged: {e}'
                print(printable(message), file=sys.stderr, flush=True)
                bad.append(step)
                if jax.process_count() > 1 and step > steps[0]:
                    self.set_aside(bad)
                    raise Lost(f'{message}; it was set aside') from e
                continue
            self.set_aside(bad)
            self.known = {s: v for s, v in self.known.items() if s <= step}  # later ones run again
            return state
        if bad:
            raise UserError(
                f'none of the {len(bad)} checkpoints in {self.path} is sound; '
                'name another workdir to start anew'
            )
        return None

    def set_aside(self, steps):
        """Renames damaged checkpoints, so that their steps can be saved again."""
        for step in steps:
            aside = self.path / f'damaged-{step}'
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                aside.rmtree(missing_ok=True)  # if the same step was damaged before
                (self.path / str(step)).rename(aside)
        if steps:
            self.manager.reload()


def unreadable(path, what, error):
    """The exception for a failed read: Damaged, or UserError if a server did not answer."""
    if storage.remote(path) and storage.away(error):
        return UserError(f'can not read checkpoint {path}: {storage.why(error)}')
    return Damaged(f'{what} can not be read ({reason(error)})')


def newest(workdir, abstract):
    """The state of the newest checkpoint in `workdir`; None if there is none yet.

    If the run is still training and deletes the checkpoint while it is read, a newer one is read
    instead. Raises UserError, Damaged.
    """
    tried, error = None, Damaged('its run deletes faster than this can read')
    for _ in range(10):
        try:
            checkpoints = Checkpoints(workdir, read_only=True)
        except FileNotFoundError:  # Orbax listed a checkpoint that has been deleted
            continue
        with checkpoints:
            steps = checkpoints.steps()
            if not steps:
                return None
            if steps[-1] == tried:
                break
            tried = steps[-1]
            try:
                return checkpoints.restore(tried, abstract)
            except Damaged as e:
                error = e
    raise error


def weights(path, *, average):
    """Reads {name: numpy array} of the parameters from a checkpoint `path` (checkpoints/STEP).

    Needs neither optimizer nor config. `average` selects their moving average (True; UserError if
    there is none), the parameters (False) or the average if there is one (None). Raises Damaged.
    """
    path = epath.Path(path)
    quieten()
    try:
        kept = json.loads((path / 'contents' / 'metadata').read_text())
    except Exception as e:  # anything that the libraries raise for a broken file or a server
        raise unreadable(path, 'its list of arrays', e) from e
    places = {name: name for name in kept if name.startswith('params/')}
    for name in kept if average is not False else ():
        match = re.fullmatch(r'opt_state/(?:.*/)?average/(.*)', name)
        if match:
            places[f'params/{match[1]}'] = name
    if average and all(name == place for name, place in places.items()):
        raise UserError(f'{path} has no moving average of its parameters (ema)')
    wanted = set(places.values())
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path / 'state').item_metadata.tree
            item = jax.tree_util.tree_map_with_path(
                lambda p, _: 0 if leaf_name(p) in wanted else ocp.PLACEHOLDER, tree
            )
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            state = checkpointer.restore(
                path / 'state', args=ocp.args.PyTreeRestore(item=item, restore_args=plain)
            )
    except Exception as e:
        raise unreadable(path, 'its arrays', e) from e
    values = {name: value for name, value in named(state).items() if name in wanted}
    for name, found in contents(values).items():
        if found != kept[name]:
            raise Damaged(f'the bits of {name} are not those that were saved')
    return {name.removeprefix('params/'): values[place] for name, place in places.items()}


def check_space(path, state):
    """Raises OSError if a local disk lacks the space for this process's shards.

    Orbax would fail in the background, with a traceback for each array.
    """
    if '://' in str(path):
        return
    shards = [s for x in jax.tree.leaves(state) for s in x.addressable_shards if not s.replica_id]
    if shutil.disk_usage(path).free < sum(s.data.nbytes for s in shards) * 1.05 + 2**18:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def quieten():
    """Silences messages of Orbax that duplicate the errors that it raises."""
    for logger in ('asyncio', 'absl'):
        logging.getLogger(logger).addFilter(worth_saying)
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
    if getattr(sys.unraisablehook, 'func', None) is not unraisable:
        sys.unraisablehook = functools.partial(unraisable, otherwise=sys.unraisablehook)


def worth_saying(record):
    """Logging filter that drops messages of Orbax: failed background writes, which its next call
    raises, read-only mode, a metadata file that incomplete checkpoints lack, and waits."""
    background = record.filename in ('future.py', 'base_events.py', 'async_checkpointer.py')
    background |= 'orbax' in record.pathname and bool(record.exc_info)
    usual = ('read only', 'Metadata file does not exist', 'Waiting for previous save')
    return not background and not any(words in str(record.msg) for words in usual)


def to_keep(steps, scores, *, keep, keep_every, largest, protected=()):
    """Steps to keep: the last, the best, multiples of `keep_every`, `protected` without a score."""
    kept = set(sorted(steps)[-keep:]) | {s for s in protected if s not in scores}
    if keep_every:
        kept |= {s for s in steps if s % keep_every == 0}
    best = history.best(steps, scores, largest=largest)
    return kept if best is None else kept | {best}


def reason(error):
    """The first exception of a chain, as one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return re.sub(r'\s+', ' ', str(error))[:300] or repr(error)


def unraisable(args, otherwise):
    """A sys.unraisablehook that drops further errors of a failed checkpoint after the first."""
    files = [frame.filename for frame in traceback.extract_tb(args.exc_traceback)]
    orbax = any('orbax' in f for f in files) or str(args.exc_value) == 'Event loop is closed'
    orbax |= args.object is asyncio.BaseEventLoop.__del__  # event loop without a file descriptor
    if not orbax or issubclass(args.exc_type, KeyboardInterrupt):
        otherwise(args)
