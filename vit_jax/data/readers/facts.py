"""Fingerprints of data sets at little cost: names of classes, count, order, sizes.

The processes of a run compare them before they train, and a resumed run compares them with those
that it started with. No image is read; the fingerprint has the names and sizes of files, and the
headers and labels of shards. Records (see `sources`) have `traits()`, a pair of lists of text,
bytes or arrays: what determines the order of the examples, and what determines their contents. The
location of a data set is left out, as each host may have its copy at another path.
"""

import hashlib

import numpy as np

SAMPLED = 4096  # files whose sizes are read, evenly spaced in the order
NAMED = 4  # classes that are named in full


def of(source):
    """{name: value} of a Source, equal for the same examples in the same order.

    `classes` (count), `class_names` (the first few, and a digest of all in their order), `examples`
    (count), `order` and `contents` (digests).
    """
    order, contents = traits(source.records)
    names = ', '.join(source.classes[:NAMED]) + (', ...' if len(source.classes) > NAMED else '')
    return {
        'classes': len(source.classes),
        'class_names': f'{names} ({digest(source.classes)})',
        'examples': len(source),
        'order': digest(order),
        'contents': digest(contents),
    }


def of_run(source, evaluations):
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


def traits(records):
    """Traits of records; the names of some examples for a kind without traits."""
    if hasattr(records, 'traits'):
        return records.traits()
    if not hasattr(records, 'name'):
        return [], []
    return [records.name(i) for i in sample(len(records))], []


def sample(length, most=SAMPLED):
    """Up to `most` evenly spaced indices, with the first and the last."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).astype(np.int64)).tolist()


def digest(values):
    """Hash of text, bytes and arrays, in their order, as 12 hexadecimal digits."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value.astype(value.dtype.newbyteorder('<'))).tobytes()
        elif not isinstance(value, bytes):
            value = str(value).encode('utf-8', 'surrogatepass')
        found.update(len(value).to_bytes(8, 'little') + value)
    return found.hexdigest()[:12]
