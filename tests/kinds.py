"""The same labelled images as data sets of every kind that lies in files."""

import io
import json
import struct
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vit_jax.data.readers import example, records

KINDS = ('folder', 'tar', 'parquet', 'records', 'arrow')


def png(value, size=4):
    """An image of one grey level."""
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(out, 'PNG')
    return out.getvalue()


def write(kind, path, rows, names, split='train'):
    """A split of a data set at path: rows are (bytes, label), names those of the labels in order.

    Of a folder the numbers of labels are not kept, as names alone are there.
    """
    path.mkdir(parents=True, exist_ok=True)
    WRITERS[kind](path, rows, names, split)
    return path


def write_folder(path, rows, names, split):
    for name in names:
        (path / split / name).mkdir(parents=True)
    for i, (data, label) in enumerate(rows):
        (path / split / names[label] / f'{i:03}.png').write_bytes(data)


def write_tar(path, rows, names, split):
    (path / split).mkdir()
    with tarfile.open(path / split / '0.tar', 'w') as tar:
        for i, (data, label) in enumerate(rows):
            for suffix, content in (('png', data), ('cls', b'%d' % label)):
                info = tarfile.TarInfo(f'{i:03}.{suffix}')
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (path / split / 'classes.json').write_text(json.dumps(list(names)))


def table(rows, names):
    """An Arrow table as Hugging Face's datasets write one."""
    feature = {'names': list(names), '_type': 'ClassLabel'}
    info = {'info': {'features': {'image': {'_type': 'Image'}, 'label': feature}}}
    columns = {
        'image': [{'bytes': data, 'path': None} for data, _ in rows],
        'label': [label for _, label in rows],
    }
    kind = pa.schema(
        [('image', pa.struct([('bytes', pa.binary()), ('path', pa.string())])),
         ('label', pa.int64())],
        metadata={'huggingface': json.dumps(info)},
    )  # fmt: skip
    return pa.table(columns, schema=kind)


def write_parquet(path, rows, names, split):
    pq.write_table(table(rows, names), path / f'{split}-00000-of-00001.parquet')


def write_arrow(path, rows, names, split):
    """What save_to_disk of a DatasetDict leaves."""
    (path / split).mkdir()
    found, file = table(rows, names), 'data-00000-of-00001.arrow'
    with pa.OSFile(str(path / split / file), 'wb') as out:
        with pa.ipc.new_stream(out, found.schema) as stream:
            stream.write_table(found)
    feature = {'names': list(names), '_type': 'ClassLabel'}
    info = {'features': {'image': {'_type': 'Image'}, 'label': feature}}
    (path / split / 'dataset_info.json').write_text(json.dumps(info))
    (path / split / 'state.json').write_text(json.dumps({'_data_files': [{'filename': file}]}))
    known = path / 'dataset_dict.json'
    splits = json.loads(known.read_text())['splits'] if known.exists() else []
    known.write_text(json.dumps({'splits': [*splits, split]}))


def write_records(path, rows, names, split):
    file = records.shard_name(split, 0, 1)
    encoded = [example.encode(data, [label], f'{i}') for i, (data, label) in enumerate(rows)]
    count, size, digest = records.write_shard(path / file, iter(encoded))
    place = path / records.MANIFEST
    manifest = json.loads(place.read_text()) if place.exists() else {
        'format': records.FORMAT, 'version': records.VERSION, 'max_labels': 1,
        'classes': list(names), 'splits': {},
    }  # fmt: skip
    manifest['splits'][split] = [
        {'file': file, 'examples': count, 'bytes': size, 'sha256': digest}
    ]
    place.write_text(json.dumps(manifest))


WRITERS = {
    'folder': write_folder, 'tar': write_tar, 'parquet': write_parquet, 'arrow': write_arrow,
    'records': write_records,
}  # fmt: skip


def crc32c(data):
    """Bit by bit, as the polynomial has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def tf_record(data):
    """A record of a TFRecord file: length, data, and masked CRCs of both."""

    def masked(part):
        crc = crc32c(part)
        return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack('<Q', len(data))
    return length + masked(length) + data + masked(data)
