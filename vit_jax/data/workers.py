"""Worker processes: they leave signals to this process, and end when it does.

Schedulers and terminals send a signal to all processes of a group. A worker that obeyed it would be
missing while this process finishes its step and saves.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing import resource_tracker, util
from typing import TYPE_CHECKING, Any

from absl import flags

from vit_jax.data import memory
from vit_jax.errors import UserError

if TYPE_CHECKING:
    import grain

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextlib.contextmanager
def ignore_signals() -> Iterator[None]:
    """Blocks SIGNALS, which go to the whole group, in threads and processes started in the block.

    They inherit the signal mask of this thread, so there is no moment at which a signal reaches
    them. This process handles its signals at the end of the block.
    """
    with postpone_handlers():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            resource_tracker.ensure_running()  # it unblocks all but SIGHUP when it starts
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def postpone_handlers() -> Iterator[None]:
    """Calls the handlers of SIGNALS at the end of the block, where this is the main thread.

    What this thread blocks the system gives to another one, such as NumPy's, and Python calls the
    handler in the main thread: it would leave a process half started.
    """
    received, handlers = [], {}
    if threading.current_thread() is threading.main_thread():
        known = {signum: signal.getsignal(signum) for signum in SIGNALS}
        handlers = {signum: handler for signum, handler in known.items() if callable(handler)}
    for signum in handlers:
        signal.signal(signum, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for signum in received:
            signal.raise_signal(signum)


def call_ignoring_signals(call: Callable[[], Any]) -> Any:
    """Runs a call in a thread that blocks signals; this thread handles them while it waits."""
    result = Future()

    def work():
        try:
            result.set_result(call())
        except BaseException as e:
            result.set_exception(e)

    with ignore_signals():
        threading.Thread(target=work, daemon=True).start()
    return result.result()


def end_with_parent() -> None:
    """Makes this worker ignore signals and end as soon as its parent has ended."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=exit_after_parent, daemon=True).start()


def exit_after_parent() -> None:
    """Waits for the end of the parent process and ends this one."""
    multiprocessing.parent_process().join()
    os._exit(1)  # Python's resource tracker or memory.sweep removes its shared memory


def prefetched(data: 'grain.IterDataset', workers: int) -> Iterator:
    """Iterates over a Grain data set in worker processes.

    Raises UserError with the process and exit code of a worker that dies.
    """
    import grain  # takes a second, and workers of `prepare` do not need it

    if not flags.FLAGS.is_parsed():  # Grain reads flags even without an absl app
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers)
    begin = partial(begin_worker, prefix=memory.claim())
    return watched(iter(data.mp_prefetch(options, worker_init_fn=begin)))


def begin_worker(index: int, count: int, *, prefix: str | None) -> None:
    """Prepares a worker process of Grain; `prefix` is that of its shared memory."""
    end_with_parent()
    memory.adopt(prefix)


def watched(feed: Iterator) -> Iterator:
    """Yields the elements of `feed`; raises UserError if one of its worker processes has died."""
    others = set(multiprocessing.active_children())
    take = partial(call_ignoring_signals, partial(next, feed))  # the first call starts the workers
    workers = []
    # At exit Python sends SIGTERM to the workers that Grain leaves, which ignore it, and waits.
    at_exit = util.Finalize(None, end, args=(workers,), exitpriority=0)
    try:
        while True:
            yield take()
            if not workers:
                started = set(multiprocessing.active_children()) - others
                workers += sorted(started, key=lambda process: process.pid)
                take = partial(next, feed)
    except StopIteration:
        return
    except RuntimeError as e:
        for k, process in enumerate(workers):
            if process.exitcode:
                raise UserError(
                    f'data worker {k + 1} of {len(workers)} (process {process.pid}) ended with '
                    f'exit code {process.exitcode}{signal_name(process.exitcode)}; '
                    '--config.data.workers=0 reads in threads'
                ) from e
        if 'exit code' in str(e):  # before the first batch
            raise UserError(f'a data worker could not start: {e}') from e
        raise
    finally:
        at_exit.cancel()


def end(workers: Sequence[multiprocessing.Process]) -> None:
    """Kills worker processes and waits for them."""
    for process in workers:
        process.kill()
    for process in workers:
        process.join()


def signal_name(code: int) -> str:
    """Describes an exit code: ' (SIGKILL; out of memory?)' for -9."""
    if code >= 0:
        return ''
    name = signal.Signals(-code).name
    return f' ({name}; out of memory?)' if name == 'SIGKILL' else f' ({name})'
