"""Distributes tasks to worker processes by pipes; workers ignore signals, dead ones are noticed."""

import contextlib
import multiprocessing
from multiprocessing import connection

from vit_jax.data.workers import end, ignore_signals
from vit_jax.errors import UserError


def distributed(work, job, tasks, workers, bar):
    """Yields the workers' results as they arrive; raises UserError if one refuses or dies."""
    context = multiprocessing.get_context('spawn')
    tasks, crew = list(reversed(tasks)), {}
    done, under_way = bar.done, {}  # images of finished tasks, and by pipe of those under way
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(job, theirs), daemon=True)
            with ignore_signals():
                process.start()
            theirs.close()  # so that the pipe ends when the worker dies
            give(tasks, crew, ours, process)
        while crew:
            for pipe in connection.wait(list(crew)):
                process, task = crew[pipe]
                kind, value = answer(pipe, process, task)
                if kind == 'at':
                    under_way[pipe] = value
                    bar.update(done + sum(under_way.values()))
                    continue
                under_way.pop(pipe, None)
                done += value['read']
                bar.update(done + sum(under_way.values()))
                if tasks:
                    give(tasks, crew, pipe, process)
                else:
                    del crew[pipe]
                    pipe.close()
                yield value
    finally:
        end([process for process, _ in crew.values()])


def give(tasks, crew, pipe, process):
    """Sends a worker its next task."""
    crew[pipe] = process, tasks.pop()
    with contextlib.suppress(OSError):  # it is dead: reading its answer raises
        pipe.send(crew[pipe][1])


def answer(pipe, process, task):
    """Receives (kind, value) from a worker; raises the error that it reports."""
    try:
        kind, value = pipe.recv()
    except (EOFError, OSError):
        process.join()
        raise UserError(
            f'a worker process ended with exit status {process.exitcode} in {task[0]} {task[2]} of '
            f'{task[1]}; the same command goes on where it stopped'
        ) from None
    if kind == 'refused':
        raise UserError(value)
    if kind == 'broken':
        raise RuntimeError(f'in a worker process:\n{value}')
    return kind, value
