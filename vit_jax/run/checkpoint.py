"""Checkpoints of a run: saved by Orbax in the background, verified bit by bit when restored."""

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

from vit_jax.errors import Damaged, Lost, UserError
from vit_jax.io import storage
from vit_jax.io.bounds import NonNegative, Positive
from vit_jax.io.text import printable
from vit_jax.run.fingerprints import (
    Contents,
    ContentsRestore,
    ContentsSave,
    contents,
    leaves_by_name,
    start_fingerprint,
)
from vit_jax.run.orbax_errors import (
    check_space,
    explain_write_errors,
    read_error,
    refusal_in,
    silence_repeats,
)
from vit_jax.run.retention import Retention

SLICE = 2**20  # bytes


def array_handlers() -> ocp.type_handlers.TypeHandlerRegistry:
    """Orbax's handler of arrays, which splits no slice of below `SLICE` among replicas to write it.

    Orbax compiles a program for each slice, which takes longer than to write a small one whole.
    """
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE)
    return ocp.type_handlers.create_type_handler_registry((jax.Array, handler))


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
        workdir: os.PathLike | str,
        read_only: bool = False,
        *,
        every: NonNegative[int] = 1000,
        keep: Positive[int] = 2,
        keep_every: Positive[int] | None = None,
        best: str | None = None,
        mode: Literal['max', 'min'] | None = None,
    ):
        workdir = epath.Path(workdir)
        self.every, self.read_only = every, read_only
        self.path = workdir / 'checkpoints'
        self.saving = None  # the step that this object saved last
        self.retention = None if read_only else Retention(
            workdir, keep=keep, keep_every=keep_every, best=best, mode=mode
        )
        silence_repeats()
        with storage.explained(self.path, 'read'):
            self.manager = ocp.CheckpointManager(
                self.path,
                options=ocp.CheckpointManagerOptions(
                    read_only=read_only, create=not read_only,
                    cleanup_tmp_directories=not read_only,
                    save_interval_steps=0 if read_only else 1, preservation_policy=self.retention,
                    # Else Orbax' threads wait 300 s for a folder that can't be created.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
                # Compression saves a twelfth of the bytes and takes twice as long.
                item_handlers={
                    'state': ocp.PyTreeCheckpointHandler(
                        use_compression=False, type_handler_registry=array_handlers()
                    ),
                    'contents': Contents(),
                },
            )  # fmt: skip
        if self.retention and self.retention.scores_lost:
            self.retention.protected = self.steps()

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            with self.explain_write_errors(), contextlib.closing(self.manager):
                if not self.read_only:
                    self.manager.wait_until_finished()
            if kind and not self.read_only:
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(self.path)
        except Exception as e:
            if not kind:
                raise
            refusal = refusal_in(str(e))
            if refusal is None or refusal not in str(error):  # else the block's error says it
                print(printable(e), file=sys.stderr, flush=True)

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return sorted(self.manager.all_steps())

    def is_due(self, step: int) -> bool:
        """Whether to save a checkpoint at a step before the end."""
        return self.every > 0 and step % self.every == 0

    def save(self, step: int, state: Any, scores: Mapping[int, float]) -> None:
        """Starts to save `state`; its arrays may be donated as soon as this returns.

        Args:
          step: step of the state.
          state: step.State, or any tree of arrays.
          scores: {step: value of the metric `best`}, for values that `add_results` was not given.
        """
        self.retention.update_scores(scores)
        self.wait()
        if step in self.steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), contents=ContentsSave(start_fingerprint(state))
        )
        with explain_write_errors(self.path / str(step)):
            check_space(self.path, state)
            self.manager.save(step, args=args, force=True)
        self.saving = step

    def add_results(self, step: int, metrics: Mapping[str, float]) -> None:
        """Saves the results of an evaluation in a file beside the checkpoints."""
        self.retention.add_results(step, metrics, self.steps())

    def wait(self) -> None:
        """Waits until the checkpoint that is being saved is complete."""
        with self.explain_write_errors():
            self.manager.wait_until_finished()

    def explain_write_errors(self) -> contextlib.AbstractContextManager[None]:
        """Turns errors of the last save into UserError."""
        path = self.path if self.saving is None else self.path / str(self.saving)
        return explain_write_errors(path)

    def restore(self, step: int, abstract: Any) -> Any:
        """Restores the state saved at `step`.

        Args:
          step: step of a checkpoint.
          abstract: tree of jax.ShapeDtypeStruct, which has the shapes, dtypes and shardings.

        Raises:
          Damaged: a file cannot be read, or a bit differs from what was saved.
          UserError: the checkpoint has other arrays, or a server did not answer.
        """
        path = self.path / str(step)
        try:
            saved = self.manager.restore(
                step, args=ocp.args.Composite(contents=ContentsRestore())
            ).contents
        except Exception as e:  # anything that the libraries raise for a broken file
            raise read_error(path, 'its list of arrays', e) from e
        wanted = {n: [list(x.shape), str(x.dtype)] for n, x in leaves_by_name(abstract).items()}
        for name in sorted(wanted.keys() | saved.keys()):
            if saved.get(name, [])[:2] != wanted.get(name, []):
                raise UserError(
                    f'checkpoint {path} does not fit the config: {name} is '
                    f'{saved.get(name, ["absent"])[:2]} there and {wanted.get(name, "absent")} here'
                )
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        try:
            state = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(abstract, restore_args))
            ).state
        except Exception as e:
            raise read_error(path, 'its arrays', e) from e
        check_bits(state, saved)
        return state

    def resume(self, abstract: Any) -> Any | None:
        """Restores the newest intact state; None in a new run.

        Damaged checkpoints are reported and renamed. One of several processes can't fall back to an
        older checkpoint by itself, as the others may have read their parts of the newest: it raises
        Lost, and the next start finds the older one.

        Raises UserError if all checkpoints are damaged.
        """
        damaged, steps = [], self.steps()
        for step in reversed(steps):
            try:
                state = self.restore(step, abstract)
            except Damaged as e:
                message = f'checkpoint {self.path / str(step)} is damaged: {e}'
                print(printable(message), file=sys.stderr, flush=True)
                damaged.append(step)
                if jax.process_count() > 1 and step > steps[0]:
                    self.set_aside(damaged)
                    raise Lost(f'{message}; it was set aside') from e
                continue
            self.set_aside(damaged)
            self.retention.drop_results_after(step)
            return state
        if damaged:
            raise UserError(
                f'none of the {len(damaged)} checkpoints in {self.path} is sound; '
                'name another workdir to start anew'
            )
        return None

    def set_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again."""
        for step in steps:
            aside = self.path / f'damaged-{step}'
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                aside.rmtree(missing_ok=True)  # if the same step was damaged before
                (self.path / str(step)).rename(aside)
        if steps:
            self.manager.reload()


def check_bits(state: Any, saved: Mapping[str, list]) -> None:
    """Raises Damaged unless every array of a state has the bits that `contents` recorded."""
    for name, entry in contents(state).items():
        if entry != saved[name]:
            raise Damaged(f'the bits of {name} are not those that were saved')


def restore_newest(workdir: os.PathLike | str, abstract: Any) -> Any | None:
    """Restores the newest checkpoint in `workdir`; None if there is none yet.

    If the run is still training and deletes the checkpoint while it is read, a newer one is read
    instead. Raises UserError, Damaged.
    """
    last_step = None
    error = Damaged('its run deletes checkpoints faster than they can be read')
    for _ in range(10):
        try:
            checkpoints = Checkpoints(workdir, read_only=True)
        except (FileNotFoundError, NotADirectoryError):  # a checkpoint vanished as Orbax listed it
            continue
        with checkpoints:
            steps = checkpoints.steps()
            if not steps:
                return None
            if steps[-1] == last_step:
                break
            last_step = steps[-1]
            try:
                return checkpoints.restore(last_step, abstract)
            except Damaged as e:
                error = e
    raise error
