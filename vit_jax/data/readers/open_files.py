"""Keeps some of many files open, for readers of examples that lie in several files."""

import collections
import resource
import threading
from typing import Any

import numpy as np


def most_open(limit: int) -> int:
    """Number of files to keep open: `limit`, or a quarter of the process's file descriptors."""
    return min(limit, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


class OpenFiles:
    """Examples in several files, of which those used last stay open; thread-safe.

    Pickled without the open files: another process opens them again. A subclass sets `ends`, int64
    [files], which counts the examples up to the end of each file, calls `close` at first, and
    defines `open_file(k)`, which returns a reader of file k.
    """

    ends: np.ndarray
    limit = 256  # open files, each with a file descriptor and perhaps an index

    def close(self) -> None:
        """Closes all files; the next example opens one again."""
        self.readers, self.lock = collections.OrderedDict(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ('readers', 'lock')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.close()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, i: int) -> tuple[int, int]:
        """(index of the file, position in it) of example i; raises IndexError."""
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f'no example {i} among {len(self)}')
        k = int(self.ends.searchsorted(i, 'right'))
        return k, i - (int(self.ends[k - 1]) if k else 0)

    def reader(self, k: int) -> Any:
        """The reader of file k."""
        with self.lock:
            if k in self.readers:
                self.readers.move_to_end(k)
                return self.readers[k]
        reader = self.open_file(k)  # not under the lock: it may be downloaded first
        with self.lock:
            self.readers[k] = reader
            while len(self.readers) > most_open(self.limit):
                self.readers.popitem(last=False)  # closed with the last thread that reads from it
        return reader
