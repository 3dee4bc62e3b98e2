"""Encodes and decodes tf.train.Example, the record of `records` and of TFRecord files.

The message (tensorflow/core/example/example.proto) is described here, in a pool of its own:
TensorFlow and TFDS may register theirs in the same process.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

PACKAGE = 'vit_jax'
Field = descriptor_pb2.FieldDescriptorProto


def message_class() -> type[message.Message]:
    """Builds the class of tf.train.Example."""
    file = descriptor_pb2.FileDescriptorProto(
        name='vit_jax/example.proto', package=PACKAGE, syntax='proto3'
    )

    def add_field(to, name, number, kind, repeated=False, **options):
        label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
        if isinstance(kind, str):
            options, kind = options | {'type_name': f'.{PACKAGE}.{kind}'}, Field.TYPE_MESSAGE
        to.field.add(name=name, number=number, type=kind, label=label, **options)

    lists = {
        'bytes_list': ('BytesList', Field.TYPE_BYTES),
        'float_list': ('FloatList', Field.TYPE_FLOAT),
        'int64_list': ('Int64List', Field.TYPE_INT64),
    }
    feature = descriptor_pb2.DescriptorProto(name='Feature')
    feature.oneof_decl.add(name='kind')
    for number, (name, (kind, values)) in enumerate(lists.items(), start=1):
        add_field(file.message_type.add(name=kind), 'value', 1, values, repeated=True)
        add_field(feature, name, number, kind, oneof_index=0)
    file.message_type.append(feature)
    features = file.message_type.add(name='Features')
    entry = features.nested_type.add(name='FeatureEntry')
    entry.options.map_entry = True
    add_field(entry, 'key', 1, Field.TYPE_STRING)
    add_field(entry, 'value', 2, 'Feature')
    add_field(features, 'feature', 1, 'Features.FeatureEntry', repeated=True)
    add_field(file.message_type.add(name='Example'), 'features', 1, 'Features')
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f'{PACKAGE}.Example'))


Example = message_class()
Values = Sequence[bytes] | Sequence[float] | Sequence[int]


def encode(
    image: bytes, labels: Sequence[int], name: str, fields: Mapping[str, Any] | None = None
) -> bytes:
    """Encodes the bytes of an image, its labels and its name; equal input gives equal bytes.

    Other fields are bytes, text, several of these or arrays of numbers; all else is written as
    JSON.
    """
    example = Example()
    features = example.features.feature
    features['image'].bytes_list.value.append(image)
    features['label'].int64_list.SetInParent()  # an empty list, where there are no labels
    features['label'].int64_list.value.extend(map(int, labels))
    features['name'].bytes_list.value.append(name.encode('utf-8', 'surrogateescape'))
    for key, one in (fields or {}).items():
        array = None if isinstance(one, bytes | str) or are_texts(one) else numbers(one)
        if array is not None:
            floats = array.dtype.kind == 'f'
            own = features[key].float_list if floats else features[key].int64_list
            own.SetInParent()  # an empty list, where there are none
            own.value.extend(array.astype(np.float64 if floats else np.int64).ravel().tolist())
            continue
        several = one if are_texts(one) else [one]
        several = [one if isinstance(one, bytes | str) else json.dumps(one) for one in several]
        features[key].bytes_list.value.extend(
            one if isinstance(one, bytes) else one.encode('utf-8', 'surrogateescape')
            for one in several
        )
    return example.SerializeToString(deterministic=True)


def are_texts(value: Any) -> bool:
    """Whether a value is a list of bytes or of texts, such as captions."""
    several = isinstance(value, (list, tuple)) or isinstance(value, np.ndarray) and value.ndim == 1
    return several and len(value) > 0 and all(isinstance(one, bytes | str) for one in value)


def numbers(one: Any) -> np.ndarray | None:
    """An array of numbers: one, or a number, or a list of numbers or of equally long lists.

    None for anything else. Deeper lists are none: the segmentations of COCO.
    """
    if isinstance(one, np.ndarray):
        return one
    try:
        array = np.asarray(one)
    except ValueError:  # lists of several lengths
        return None
    flat = array.dtype.kind in 'biuf' and array.ndim < 3
    return array if flat and (array.size or array.ndim < 2) else None


def decode(record: bytes) -> dict[str, Values]:
    """Decodes all features: {name: values}. Raises ValueError if the record is none."""
    try:
        features = Example.FromString(record).features.feature
    except message.DecodeError as e:
        raise ValueError(f'no tf.train.Example: {e}') from e
    found = {}
    for name, feature in features.items():
        kind = feature.WhichOneof('kind')
        found[name] = getattr(feature, kind).value if kind else ()
    return found


def one_bytes(features: Mapping[str, Values], name: str) -> bytes:
    """The only value of a feature of bytes; raises ValueError for anything else."""
    values = features.get(name)
    if values is None:
        raise ValueError(f'it has no feature {name}')
    if len(values) != 1:
        raise ValueError(f'feature {name} has {len(values)} values, not one')
    value = values[0]  # each access copies
    if not isinstance(value, bytes):
        raise ValueError(f'feature {name} is not bytes')
    return value


def integers(features: Mapping[str, Values], name: str) -> tuple[int, ...]:
    """The values of a feature of int64; raises ValueError for another type."""
    values = features.get(name)
    if values is None:
        raise ValueError(f'it has no feature {name}')
    if len(values) and type(values[0]) is not int:
        raise ValueError(f'feature {name} is not int64')
    return tuple(values)


def value(values: Values) -> bytes | list[bytes] | np.ndarray:
    """A feature as a field of a record: its only bytes, a list of bytes, or numbers [n]."""
    if len(values) and isinstance(values[0], bytes):
        return values[0] if len(values) == 1 else list(values)
    return np.array(values)
