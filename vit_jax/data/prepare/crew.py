"""Distributes tasks to worker processes by pipes; workers ignore signals, dead ones are noticed."""

import contextlib
import multiprocessing
import sys
import time
from multiprocessing import connection

from vit_jax.data.workers import end, ignore_signals
from vit_jax.errors import UserError


def distributed(work, job, tasks, workers, bar):
    """Yields the workers' results as they arrive; raises UserError if one refuses or dies."""
    context = multiprocessing.get_context('spawn')
    tasks, crew = list(reversed(tasks)), {}
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
                    bar.at(pipe, value)
                    continue
                bar.at(pipe, 0)
                bar.add(value['read'])
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


class Bar:
    """Progress bar on a terminal, else a plain line every ten seconds; on stderr.

    The first line is printed at once and the last one at the end, or, if `brief`, none before ten
    seconds have passed.
    """

    def __init__(self, title, total, done=0, brief=False):
        self.title, self.total, self.done, self.brief = title, total, done, brief
        self.under_way, self.began = {}, (time.time(), done)
        self.said = time.time() if brief else 0.0
        self.bar = None
        if sys.stderr.isatty():
            import rich.console
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn(title, markup=False),
                progress.MofNCompleteColumn(),
                progress.BarColumn(bar_width=24),
                progress.TextColumn('{task.fields[text]}'),
                progress.TimeRemainingColumn(compact=True),
                progress.TextColumn('left'),
                console=rich.console.Console(stderr=True),
            )
            self.task = self.bar.add_task('', total=total, completed=done, text='')
            self.bar.start()

    def at(self, worker, count):
        """Updates the progress of a worker within its task."""
        self.under_way[worker] = count
        self.show()

    def add(self, count):
        self.done += count
        self.show()

    def show(self):
        now, done = time.time(), self.done + sum(self.under_way.values())
        rate = (done - self.began[1]) / max(now - self.began[0], 1e-3)
        if self.bar:
            self.bar.update(self.task, completed=done, text=f'{rate:,.0f} images/s')
        elif now - self.said >= 10 or self.done == self.total and not self.brief:
            self.said = now
            print(f'{self.title} {done:,}/{self.total:,}  {rate:,.0f} images/s', file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar:
            self.bar.stop()
