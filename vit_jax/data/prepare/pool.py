"""Distributes tasks to worker processes by pipes; workers ignore signals, dead ones are noticed.

A worker receives tasks and sends pairs (kind, value): ('progress', images of the task so far) any
number of times, then ('result', a dict with 'read', the images of the task). It ends with
('refusal', message) for a mistake of the user, and ('bug', traceback) for any other error.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from vit_jax.data.workers import end, ignore_signals
from vit_jax.errors import UserError
from vit_jax.io.progress import Bar


def results(
    work: Callable[[Any, connection.Connection], None],
    job: Any,
    tasks: Sequence[Any],
    workers: int,
    bar: Bar,
) -> Iterator[dict[str, Any]]:
    """Yields the results of all tasks as they arrive.

    Args:
      work: what a worker runs, with the job and its end of the pipe.
      job: what all workers share; picklable.
      tasks: picklable, and named by str().
      workers: number of processes.
      bar: shows how many images are read.

    Raises:
      UserError: a worker refused its task, or died.
    """
    context = multiprocessing.get_context('spawn')  # not fork: threads hold locks
    queue = list(reversed(tasks))
    busy = {}  # (process, its task) by pipe
    finished, unfinished = bar.done, {}  # images of finished tasks; by pipe, of those under way
    try:
        for _ in range(min(workers, len(queue))):
            pipe, theirs = context.Pipe()
            process = context.Process(target=work, args=(job, theirs), daemon=True)
            with ignore_signals():
                process.start()
                busy[pipe] = process, queue.pop()
            theirs.close()  # so that the pipe ends when the worker dies
            send_task(pipe, busy[pipe][1])
        while busy:
            for pipe in connection.wait(list(busy)):
                process, task = busy[pipe]
                kind, value = receive(pipe, process, task)
                if kind == 'progress':
                    unfinished[pipe] = value
                    bar.update(finished + sum(unfinished.values()))
                    continue
                unfinished.pop(pipe, None)
                finished += value['read']
                bar.update(finished + sum(unfinished.values()))
                if queue:
                    busy[pipe] = process, queue.pop()
                    send_task(pipe, busy[pipe][1])
                else:
                    del busy[pipe]
                    pipe.close()
                yield value
    finally:
        end([process for process, _ in busy.values()])


def send_task(pipe: connection.Connection, task: Any) -> None:
    """Sends a task to a worker, unless the worker is dead."""
    with contextlib.suppress(OSError):  # `receive` raises
        pipe.send(task)


def receive(
    pipe: connection.Connection, process: multiprocessing.Process, task: Any
) -> tuple[str, Any]:
    """Receives (kind, value) from a worker; raises the error that it reports."""
    try:
        kind, value = pipe.recv()
    except (EOFError, OSError):
        process.join()
        raise UserError(
            f'a worker process ended with exit status {process.exitcode} in {task}; the same '
            'command resumes'
        ) from None
    if kind == 'refusal':
        raise UserError(value)
    if kind == 'bug':
        raise RuntimeError(f'in a worker process:\n{value}')
    return kind, value
