"""Fingerprints of data sets at little cost: classes, count, order, sizes and a sample of the bytes.

The processes of a run compare them before they train, and a resumed run compares them with those
of its start. Records (see `sources`) have `traits()`, from which the fingerprint is made. The
contents of the examples are known by their sizes, and of local files by a sample of their bytes
(`sample_digest`): a change beyond the sample that keeps every size goes unnoticed. At an address
(gs://, https://) no example is read, as each takes a request. The location of a data set is left
out, as each host may have its copy at another path.
"""

import concurrent.futures
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MOST_SIZES = 4096  # files whose sizes are read, evenly spaced in the order
SAMPLE = 64  # examples whose bytes are read, evenly spaced in the order
SMALL = 4096, 2**26  # examples, and bytes by the mean of the sample; of fewer all are read
THREADS = 8  # to read them; they wait for the disk
MOST_NAMED = 4  # classes that are named in full


class Traits(NamedTuple):
    """What determines the examples of records: lists of text, bytes or arrays.

    Attributes:
      order: names, labels, bounds of files.
      contents: sizes of all examples or shards, or of up to `MOST_SIZES` files; digests that a
        manifest has.
      sample: `sample_digest` of local files. A resume from a copy without a sample ignores it.
    """

    order: Sequence
    contents: Sequence = ()
    sample: Sequence = ()


def of(source: Any) -> dict[str, Any]:
    """{name: value} of a Source, equal for the same examples in the same order.

    `classes` (count), `class_names` (the first few, and a digest of all in their order), `examples`
    (count), `order`, `contents` and, of local files, `sample` (digests).
    """
    own = traits(source.records)
    more = ', ...' if len(source.classes) > MOST_NAMED else ''
    names = ', '.join(source.classes[:MOST_NAMED]) + more
    return {
        'classes': len(source.classes),
        'class_names': f'{names} ({digest(source.classes)})',
        'examples': len(source),
        'order': digest(own.order),
        'contents': digest(own.contents),
        **({'sample': digest(own.sample)} if len(own.sample) else {}),
    }


def of_run(source: Any, evaluations: Mapping[str, Any]) -> dict[str, Any]:
    """{'data.classes': ..., 'evals.NAME.classes': ...} of a run's training set and evaluations.

    `evaluations` are objects by name that have `sources`: {'source': Source, 'train_source':
    Source}.
    """
    sets = {'data': source}
    for name, evaluation in evaluations.items():
        for kind, one in evaluation.sources.items():
            part = kind.removesuffix('source').removesuffix('_')
            sets[f'evals.{name}.{part}'.removesuffix('.')] = one
    return {f'{name}.{key}': value for name, one in sets.items() for key, value in of(one).items()}


def traits(records: Any) -> Traits:
    """Traits of records; the names of some examples for a kind without traits."""
    if hasattr(records, 'traits'):
        return records.traits()
    if not hasattr(records, 'name'):
        return Traits(())
    return Traits([records.name(i) for i in spaced(len(records))])


def spaced(length: int, most: int = MOST_SIZES) -> list[int]:
    """Up to `most` evenly spaced indices, with the first and the last."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).astype(np.int64)).tolist()


def sample_digest(read: Callable[[int], bytes], length: int) -> str:
    """Digest of the raw bytes of `SAMPLE` of `length` examples, which `read(i)` returns.

    The count alone chooses them. Of a data set that is small (`SMALL`) all examples are read. One
    that can't be read counts as such: whether it ends the run is not decided here.
    """

    def hashed(i):
        try:
            data = read(i)
        except Exception:
            return b'unreadable', 0
        return hashlib.sha256(data).digest(), len(data)

    chosen = spaced(length, SAMPLE)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(chosen, pool.map(hashed, chosen), strict=True))
        mean = sum(size for _, size in found.values()) / max(1, len(found))
        if length <= SMALL[0] and mean * length <= SMALL[1]:
            others = [i for i in range(length) if i not in found]
            found.update(zip(others, pool.map(hashed, others), strict=True))
    return digest(found[i][0] for i in sorted(found))


def digest(values: Iterable[Any]) -> str:
    """Hash of text, bytes and arrays, in their order, as 12 hexadecimal digits."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value.astype(value.dtype.newbyteorder('<'))).tobytes()
        elif not isinstance(value, bytes):
            value = str(value).encode('utf-8', 'surrogatepass')
        found.update(len(value).to_bytes(8, 'little') + value)
    return found.hexdigest()[:12]
