"""What tells one data set from another, at little cost: names of classes, count, order, sizes.

Processes of a run compare these before they train, and a run that goes on compares them with those
that it was begun with. No image is read: what is compared are the names of files, their sizes, the
headers and labels of shards. The kinds of records (`sources`) have `traits()`, a pair of lists:
what tells the order of the examples, and what tells their contents; both of text, bytes or arrays.
Where a data set lies is none of it, as each host may have a copy at a place of its own.
"""

import hashlib

import numpy as np

SAMPLED = 4096  # files whose sizes are asked for, evenly spaced in the order
NAMED = 4  # classes that are named in full


def of(source):
    """{name: value} of a Source: the same for the same examples in the same order.

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

    `evaluations` are objects by name with `sources`: {'source': Source, 'train_source': Source}.
    """
    sets = {'data': source}
    for name, evaluation in evaluations.items():
        for kind, one in evaluation.sources.items():
            part = kind.removesuffix('source').removesuffix('_')
            sets[f'evals.{name}.{part}'.removesuffix('.')] = one
    return {f'{name}.{key}': value for name, one in sets.items() for key, value in of(one).items()}


def traits(records):
    """The traits of records; of a kind that has none, the names of some examples."""
    if hasattr(records, 'traits'):
        return records.traits()
    if not hasattr(records, 'name'):
        return [], []
    return [records.name(i) for i in sample(len(records))], []


def sample(length, most=SAMPLED):
    """Up to `most` evenly spaced indices, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).astype(np.int64)).tolist()


def digest(values):
    """12 hexadecimal digits of text, bytes and arrays, in their order."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value.astype(value.dtype.newbyteorder('<'))).tobytes()
        elif not isinstance(value, bytes):
            value = str(value).encode('utf-8', 'surrogatepass')
        found.update(len(value).to_bytes(8, 'little') + value)
    return found.hexdigest()[:12]
