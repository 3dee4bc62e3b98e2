"""Folders of images: path/class/*, or path/train/class/* and path/val/class/*."""

import concurrent.futures
import hashlib
import os

import numpy as np
from etils import epath

from vit_jax.data import facts, ranges


class Files:
    """Paths below a folder, and their labels."""

    def __init__(self, root, paths, labels):
        self.root, self.paths, self.labels = root, paths, labels

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return epath.Path(self.paths[i]).read_bytes(), self.labels[i]

    def traits(self):
        names = [path.removeprefix(self.root) for path in self.paths]
        order = [np.array(self.labels, np.int32), '\0'.join(names)]
        if '://' in self.root:  # a request for each
            return order, []
        with concurrent.futures.ThreadPoolExecutor(ranges.THREADS) as pool:
            sizes = list(pool.map(size_of, (self.paths[i] for i in facts.sample(len(self)))))
        return order, [np.array(sizes, np.int64)]

    def name(self, i):
        return self.paths[i]


def size_of(path):
    """Bytes of a file, -1 where it is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def percentile(name):
    """A number in [0, 100) that the file's name alone decides."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64 * 100
