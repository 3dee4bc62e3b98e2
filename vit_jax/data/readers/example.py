"""Writes and parses tf.train.Example, the record of `records` and of TFRecord files.

It implements the wire format of protocol buffers itself, because a worker process that imports a
library for it takes seconds to start.
"""


VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers
INT64_LIST, BYTES_LIST = 3, 1  # fields of tf.train.Feature


def varint(value):
    """Encodes an integer in 7 bits per byte, the lowest first; a negative one as 64 bits."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number, *parts):
    """Encodes a field of bytes: the parts, concatenated, behind their length."""
    return b''.join((varint(number << 3 | BYTES), varint(sum(map(len, parts))), *parts))


def feature(key, kind, *parts):
    """Encodes an entry of the map of features, whose list of type `kind` has the parts."""
    value = field(2, field(kind, *parts))  # each copies; a record is written once
    return field(1, field(1, key), value)


def encode(image, labels, name):
    """Encodes the bytes of an image, its labels (ints) and its name as a tf.train.Example."""
    numbers = b''.join(varint(int(label)) for label in labels)
    return field(
        1,
        feature(b'image', BYTES_LIST, field(1, image)),
        feature(b'label', INT64_LIST, field(1, numbers) if numbers else b''),
        feature(b'name', BYTES_LIST, field(1, name.encode('utf-8', 'surrogateescape'))),
    )


def read_varint(data, at, end):
    """(64-bit number, where it ends); raises ValueError if the data ends before."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
        shift += 7
        if shift > 63:
            raise ValueError('a number of more than ten bytes')
    raise ValueError('the record ends within a number')


def fields(data, at, end):
    """Yields (number, wire type, start, stop) of a message's fields; ValueError if damaged."""
    while at < end:
        tag = data[at]
        at += 1
        if tag > 127:
            tag, at = read_varint(data, at - 1, end)
        number, kind, start = tag >> 3, tag & 7, at
        if kind == BYTES:
            if at < end and data[at] < 128:
                size, start = data[at], at + 1
            else:
                size, start = read_varint(data, at, end)
            at = start + size
        elif kind == VARINT:
            at = read_varint(data, at, end)[1]
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f'wire type {kind}')
        if at > end or not 0 < number < 2**29:
            raise ValueError('a field is longer than its message' if at > end else 'field number')
        yield number, kind, start, at


def parse(record):
    """(bytes of the image, labels, name) of a tf.train.Example; raises ValueError if it is none."""
    found = {}
    for number, kind, start, stop in fields(record, 0, len(record)):
        if number == 1 and kind == BYTES:
            for inner, inner_kind, begin, end in fields(record, start, stop):
                if inner == 1 and inner_kind == BYTES:
                    key, span = entry(record, begin, end)
                    found[key] = span
    if b'image' not in found:
        raise ValueError('it has no feature image')
    image = one_bytes(record, *found[b'image'], 'image')
    labels = integers(record, *found[b'label']) if b'label' in found else ()
    name = one_bytes(record, *found[b'name'], 'name') if b'name' in found else b''
    return image, labels, name.decode('utf-8', 'surrogateescape')


def entry(data, at, end):
    """(key, (start, stop) of the feature) of an entry of the map of features."""
    key, span = b'', (at, at)
    for number, kind, start, stop in fields(data, at, end):
        if kind == BYTES and number == 1:
            key = data[start:stop]
        elif kind == BYTES and number == 2:
            if span[0] < span[1]:  # the format merges them; no writer has two
                raise ValueError('a feature has two values')
            span = start, stop
    return key, span


def values(data, at, end, wanted, what):
    """[(wire type, start, stop)] of a feature's values; ValueError for another kind of list."""
    found, spans = [], []
    for number, kind, start, stop in fields(data, at, end):
        if kind == BYTES and number in (1, 2, 3):
            if number != wanted:
                raise ValueError(f'feature {what} is of another type')
            spans.append((start, stop))
    for span in spans:
        found += [(k, start, stop) for n, k, start, stop in fields(data, *span) if n == 1]
    return found


def one_bytes(data, at, end, what):
    """The only value of a feature of bytes, copied once; raises ValueError for other counts."""
    spans = [slice(*s) for kind, *s in values(data, at, end, BYTES_LIST, what) if kind == BYTES]
    if len(spans) != 1:
        raise ValueError(f'feature {what} has {len(spans)} values, not one')
    return bytes(data[spans[0]])


def integers(data, at, end):
    """The int64 values of a feature as a tuple, packed in one field or in one field each."""
    result = []
    for kind, start, stop in values(data, at, end, INT64_LIST, 'label'):
        while kind in (VARINT, BYTES) and start < stop:
            value, start = read_varint(data, start, stop)
            result.append(value - 2**64 if value >= 2**63 else value)
    return tuple(result)
