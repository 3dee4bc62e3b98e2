"""Shows the progress of a command: a bar on a terminal, lines of text elsewhere."""

import sys
import time
from typing import Literal

from vit_jax.io.text import printable

PERIOD = 10  # least seconds between two lines


class Bar:
    """A progress bar on a terminal, else a plain line at most every ten seconds.

    Plain lines begin with the first update and end with the last, unless `brief`.

    Args:
      title: name of what is counted: 'step', 'images'.
      total: the count at the end; None: unknown.
      done: the count at the beginning.
      text: what the bar says before the first update.
      unit: what is counted, for the rate; 'bytes' are shown as such.
      stream: where to write.
      brief: whether to print no plain line until ten seconds have passed.
      shown: whether to write anything.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        done: int = 0,
        *,
        text: str = '',
        unit: Literal['images', 'bytes'] = 'images',
        stream: Literal['stdout', 'stderr'] = 'stderr',
        brief: bool = False,
        shown: bool = True,
    ):
        self.title, self.total, self.done = title, total, done
        self.unit, self.stream, self.brief, self.shown = unit, stream, brief, shown
        self.first = None  # (time, count) of the first update, which may follow a compilation
        self.printed = (time.time() if brief else 0.0), None  # (time, count) of the last line
        self.bar = None
        if shown and getattr(sys, stream).isatty():
            import rich.console
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn(title, markup=False),
                progress.DownloadColumn() if unit == 'bytes' else progress.MofNCompleteColumn(),
                progress.BarColumn(bar_width=24),
                progress.TextColumn('{task.fields[text]}', markup=False),
                progress.TimeRemainingColumn(compact=True),
                progress.TextColumn('left'),
                console=rich.console.Console(stderr=stream == 'stderr'),
            )
            self.task = self.bar.add_task('', total=total, completed=done, text=text)
            self.bar.start()

    def add(self, count: int) -> None:
        """Counts more."""
        self.update(self.done + count)

    def update(self, done: int, text: str | None = None) -> None:
        """Shows a new count and a text; by default the text is the rate."""
        now, self.done = time.time(), done
        self.first = self.first or (now, done)
        rate = (done - self.first[1]) / max(now - self.first[0], 1e-3)
        if text is None:
            shown = f'{rate / 1e6:,.1f} MB/s' if self.unit == 'bytes' else f'{rate:,.0f} images/s'
            text = shown if rate else ''
        if self.bar:
            self.bar.update(self.task, completed=done, text=text)
            return
        last = done == self.total and not self.brief and self.printed[1] != done
        if self.shown and (last or now - self.printed[0] >= PERIOD):
            self.printed = now, done
            known = self.total is not None
            left = f'{(self.total - done) / rate:,.0f} s left' if known and rate else ''
            count = f'{self.title} {done:,}' + (f'/{self.total:,}' if known else '')
            parts = f'{count} bytes' if self.unit == 'bytes' else count, text, left
            self.print('  '.join(filter(None, parts)))

    def print(self, text: str) -> None:
        """Prints lines of text, above the bar if there is one."""
        if self.bar:
            self.bar.console.print(printable(text, '\n'), highlight=False, markup=False)
        elif self.shown:
            print(printable(text, '\n'), file=getattr(sys, self.stream), flush=True)

    def close(self) -> None:
        """Leaves the bar on the terminal as it is."""
        if self.bar:
            self.bar.stop()

    def __enter__(self) -> 'Bar':
        return self

    def __exit__(self, *exception) -> None:
        self.close()
