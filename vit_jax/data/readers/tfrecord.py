"""TFRecords of TFDS at any index, without TensorFlow.

A TFRecord is uint64 length, masked CRC-32C of the length, data, masked CRC-32C of the data
(tensorflow/core/lib/io/record_writer.h). One pass over the lengths finds where records begin, which
is kept in the cache. A record is a tf.train.Example.
"""

import array
import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from vit_jax.data.readers import example, facts, indices, ranges
from vit_jax.data.readers.record import Record
from vit_jax.errors import UserError
from vit_jax.io.text import brief

try:  # in the extra `remote`; without it only the lengths are verified
    from google_crc32c import value as crc32c
except ImportError:
    crc32c = None

HEADER, FOOTER = 12, 4  # bytes around the data
MASK = 0xA282EAD8


def crc_table() -> np.ndarray:
    """CRC-32C of each byte (polynomial 0x1EDC6F41, reflected): uint32 [256]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0x82F63B78), table >> 1)
    return table


TABLE = crc_table()


def crc_of_rows(rows: np.ndarray) -> np.ndarray:
    """CRC-32C of each row of bytes: uint8 [n, b] to uint32 [n]."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        crc = TABLE[(crc ^ column) & 0xFF] ^ crc >> 8
    return ~crc


def mask(crc: np.ndarray | np.uint32) -> np.ndarray | np.uint32:
    """Masks CRCs as they are stored, so that data with CRCs in them have sound CRCs: uint32 [n]."""
    with np.errstate(over='ignore'):
        return (crc >> np.uint32(15) | crc << np.uint32(17)) + np.uint32(MASK)


def scan(stream: BinaryIO, file: str, size: int) -> indices.Index:
    """{offsets, sizes: int64 [n]} of a file's records; raises UserError with the position."""
    offsets, headers, at = array.array('q'), bytearray(), 0
    while at < size:
        stream.seek(at)
        header = stream.read(HEADER)
        if len(header) < HEADER:
            break
        headers += header
        offsets.append(at + HEADER)
        at += HEADER + struct.unpack_from('<Q', header)[0] + FOOTER
    rows = np.frombuffer(bytes(headers), np.uint8).reshape(-1, HEADER)
    stored = np.ascontiguousarray(rows[:, 8:]).view('<u4')[:, 0]
    wrong = np.flatnonzero(mask(crc_of_rows(rows[:, :8])) != stored)
    if len(wrong):
        k = int(wrong[0])
        raise UserError(
            f'{file} is damaged: the length of record {k} at byte {offsets[k] - HEADER:,} '
            'has another CRC'
        )
    if at != size:
        k = max(0, len(offsets) - (at > size))
        raise UserError(f'{file} ends at byte {size:,}, within record {k}')
    sizes = np.ascontiguousarray(rows[:, :8]).view('<u8')[:, 0].astype(np.int64)
    return {'offsets': np.array(offsets, np.int64), 'sizes': sizes}


class TfRecords(ranges.Ranges):
    """Records of a TFDS split in TFRecord files: of each file, `take` after the first `skip`.

    Beside `image` and `label` they have the features of the data set by name. Nested ones are
    named with a slash. Values are those of the file: an image's bytes, and numbers.

    Args:
      counts: numbers of records that the files should have.
      image, label: features with the image, and with the label if there is one.
      shapes: {feature: shape}; the numbers of others are an array [n].
    """

    def __init__(
        self,
        files: Sequence[str],
        counts: Sequence[int],
        skips: Sequence[int],
        takes: Sequence[int],
        *,
        image: str = 'image',
        label: str | None = 'label',
        shapes: Mapping[str, tuple] | None = None,
    ):
        found = indices.build(files, scan, {'format': 'tfrecord 1'}, beside=False)
        for file, one, count in zip(files, found, counts, strict=True):
            if len(one['offsets']) != count:
                raise UserError(
                    f'{file} has {len(one["offsets"]):,} records, {count:,} by dataset_info.json'
                )
        self.skips = np.array(skips, np.int64)
        parts = [slice(skip, skip + take) for skip, take in zip(skips, takes, strict=True)]
        offsets, sizes = (
            np.concatenate([one[key][part] for one, part in zip(found, parts, strict=True)])
            for key in ('offsets', 'sizes')
        )
        self.image, self.label, self.shapes = image, label, shapes or {}
        super().__init__(files, takes, offsets, sizes + FOOTER)

    def locate(self, i: int) -> tuple[int, int]:
        k, position = super().locate(i)
        return k, position + int(self.skips[k])

    def traits(self) -> facts.Traits:
        """See `facts`."""
        names = [file.rpartition('/')[2] for file in self.files]
        sample = [facts.sample_digest(self.read, len(self))] if self.is_local() else []
        return facts.Traits([*names, self.ends, self.skips], [self.sizes], sample)

    def read(self, i: int) -> bytes:
        """Data of record i; verifies its CRC if google-crc32c is installed."""
        data = super().read(i)
        data, stored = data[:-FOOTER], int.from_bytes(data[-FOOTER:], 'little')
        if crc32c is not None and mask(np.uint32(crc32c(data))) != stored:
            raise UserError(f'record {self.name(i)} is damaged (its CRC differs)')
        return data

    def __getitem__(self, i: int) -> Record:
        try:
            features = example.decode(self.read(i))
            fields = {'image': example.one_bytes(features, self.image)}
            if self.label is not None:
                labels = example.integers(features, self.label)
                if len(labels) != 1:
                    raise ValueError(f'it has {len(labels)} labels, not one')
                fields['label'] = labels[0]
        except ValueError as e:
            if isinstance(e, UserError):
                raise
            raise UserError(f'record {self.name(i)} is damaged: {brief(e)}') from e
        return Record(fields, Features(features, self.shapes))


class Features:
    """The features of a decoded record, as `Record` asks for them."""

    def __init__(self, features: dict[str, example.Values], shapes: Mapping[str, tuple]):
        self.features, self.shapes = features, shapes

    def field_names(self, index: int) -> list[str]:
        """All features."""
        return sorted(self.features)

    def read_field(self, index: int, name: str) -> Any:
        """Bytes, a number, a list of bytes or an array."""
        value = example.value(self.features[name])
        shape = self.shapes.get(name)
        if not isinstance(value, np.ndarray) or shape is None:
            return value
        return value[0] if shape == () and len(value) == 1 else value


def of_builder(
    builder: Any, split: str, *, image: str = 'image', label: str | None = 'label'
) -> TfRecords:
    """Opens a split ('train', 'train[:90%]', 'train+test') of a TFDS builder prepared as TFRecord.

    The feature `image` is an Image of uint8, whose bytes TFDS stores unchanged; `label` is a
    ClassLabel.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features
    feature = features[image]
    if not isinstance(feature, tfds.features.Image) or feature.np_dtype != np.uint8:
        raise UserError(
            f'feature {image!r} of data set {builder.info.full_name} is {feature!r}; of data sets '
            'prepared as TFRecord only images of uint8 are read; prepare it with: '
            f'tfds build {builder.info.name} --file_format=array_record'
        )
    chosen = builder.info.splits[split].file_instructions
    shapes = {name: one.shape for name, one in features.items() if isinstance(one.shape, tuple)}
    return TfRecords(
        [str(one.filename) for one in chosen],
        [one.examples_in_shard for one in chosen],
        [one.skip for one in chosen],
        [one.take for one in chosen],
        image=image,
        label=label,
        shapes=shapes,
    )
