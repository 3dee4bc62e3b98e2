"""Hostile and broken checkpoints are refused in one line; what is legal loads bit for bit."""

import contextlib
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile

import fuzz_files
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from fuzz_files import checkpoint, each_array, limited, parted, refusal, safetensors
from safetensors.numpy import save_file

import vit_jax
from vit_jax.convert import files, load
from vit_jax.errors import UserError

HEAD = 'head/kernel'  # of the .npz that is attacked
SLACK = 4_000_000  # bytes that NumPy, zlib and the catalogue take for themselves
OPENED = []  # paths that were opened for writing or made, while this is a list in WATCHED
WATCHED = []
LOADED = {}  # {path of a seed: its parameters}


def watch(event, args):
    """An audit hook (PEP 578): it sees whatever Python code of this process writes."""
    if WATCHED and event in ('open', 'os.mkdir', 'os.rename', 'os.symlink', 'tempfile.mkstemp'):
        if event != 'open' or args[2] and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            OPENED.append(args[0])


sys.addaudithook(watch)


@contextlib.contextmanager
def nothing_written():
    OPENED.clear()
    WATCHED.append(1)
    try:
        yield
    finally:
        WATCHED.clear()
    cache = os.environ.get('JAX_COMPILATION_CACHE_DIR', '/nowhere')
    assert not [p for p in OPENED if not str(p).startswith(cache)]


@pytest.fixture(scope='module')
def seeds(tmp_path_factory):
    """{format: path} of valid checkpoints."""
    folder = tmp_path_factory.mktemp('seeds')
    paths = {format: checkpoint(folder, format) for format in fuzz_files.FORMATS}
    for path in paths.values():
        LOADED[path] = flatten_dict(vit_jax.load(path)[1], sep='/')  # JAX has then its memory
    return paths


def refused(path, *words, size=0, **options):
    """load() says in one line why it does not; it takes little memory, and writes nothing."""
    tracemalloc.start()  # of the readers alone, since it makes JAX slow
    try:
        with limited(), nothing_written():
            refusal(lambda: load.read(path, values=False, **options))
            if os.path.isfile(path):
                refusal(lambda: each_array(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with limited(), nothing_written(), pytest.raises(UserError) as error:
        vit_jax.load(path, **options)
    message = str(error.value)
    assert '\n' not in message and message.isprintable() and len(message) < 1000, message
    assert str(path) in message, message
    for word in words:
        assert word in message.replace(str(path), ''), message
    size = os.path.getsize(path) if os.path.isfile(path) else size
    assert peak < 4 * size + SLACK, f'{peak:,} bytes for {size:,}'


def members(path):
    """{member: bytes} of an .npz."""
    with zipfile.ZipFile(path) as archive:
        return {m.filename: archive.read(m) for m in archive.infolist()}


def zipped(path, members, kind=zipfile.ZIP_STORED):
    """An .npz of (member, bytes) pairs."""
    with zipfile.ZipFile(path, 'w', kind, compresslevel=1) as archive, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a name that is twice
        for name, value in members:
            archive.writestr(name, value)
    return path


def npy(value):
    """A .npy file's bytes."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asanyarray(value), allow_pickle=True)
    return out.getvalue()


def raw_npy(header, data=b'', version=b'\x01\x00'):
    """A .npy file's bytes with any text for a header."""
    size = len(header).to_bytes(2 if version == b'\x01\x00' else 4, 'little')
    return b'\x93NUMPY' + version + size + header.encode() + data


def claim(shape, descr="'<f4'", order='False', data=b'\0' * 64):
    return raw_npy(
        f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n", data
    )


def infinite(value, dtype='float32'):
    """A head with one bad value."""
    array = np.zeros((24, 5), dtype)
    array[3, 2] = value
    return npy(array)


class Pickled:
    def __reduce__(self):
        return os.mkdir, ('/tmp/vit_jax_was_here',)


PAIR = np.dtype([('a', 'i1'), ('b', 'i1')])
IN_NPZ = {  # what stands in place of head/kernel.npy, and what the message says beside its name
    'a pickle': (npy(np.array([Pickled()], object)), 'pickle'),
    'a pickle within a record': (claim((1,), "[('a', 'O')]"), 'pickle'),
    'terabytes': (claim((10**6, 10**6)), '4,000,000,000,000 bytes'),
    'nothing, of terabytes': (claim((0, 10**12), data=b''), 'axes'),
    'more than 64 bits count': (claim((2**40, 2**40)), 'impossible shape'),
    'a number of thousands of digits': (claim(f'(0x{"f" * 9000},)'), 'impossible shape'),
    'a product of thousands of digits': (claim((10**4000,) * 2), 'impossible shape'),
    'a negative axis': (claim((-24, -5)), 'impossible shape'),
    'an axis True': (claim('(True, 16)'), 'impossible shape'),
    'an axis 4.0': (claim('(4.0, 4)'), 'shape'),
    '33 axes': (claim((1,) * 32 + (16,)), 'impossible shape'),
    'no shape': (claim('None'), 'shape'),
    'an order 7': (claim((16,), order='7'), 'fortran_order'),
    'a dtype that is none': (claim((16,), "'float1000'"), 'descr'),
    'a header of parentheses': (raw_npy('(' * 9000 + '\n'), ''),
    'a header that is a call': (raw_npy('print(1)\n'), 'malformed'),
    'a header of 20,000 letters': (raw_npy(' ' * 20000 + '\n'), 'large'),
    'a header beyond the end': (raw_npy('{}\n')[:8] + b'\xff\xff{}', ''),
    'format 9.9': (raw_npy('{}\n', version=b'\x09\x09'), '(9, 9)'),
    'an empty member': (b'', ''),
    'text': (b'hello', ''),
    'NaN': (infinite(np.nan), 'finite'),
    'NaN of 16 bits': (infinite(np.nan, 'float16'), 'finite'),
    'NaN of bfloat16': (infinite(np.nan, ml_dtypes.bfloat16), 'finite'),
    'inf': (infinite(np.inf), 'finite'),
    '-inf': (infinite(-np.inf, 'float64'), 'finite'),
    'too large for float32': (infinite(1e39, 'float64'), 'too large'),
    'too negative for float32': (infinite(-1e39, 'float64'), 'too large'),
    **{
        dtype: (npy(np.zeros((24, 5), dtype)), 'which no weight has')
        for dtype in ('int32', 'uint8', 'bool', 'complex64', 'S4', 'U4', '>f4', 'M8[s]', 'V3', PAIR,
                      'longdouble')
    },
    'another shape': (npy(np.zeros((23, 5), 'f4')), '[23, 5]'),
    'another rank': (npy(np.zeros(120, 'f4')), '[120]'),
    'an empty array': (npy(np.zeros((24, 0), 'f4')), '[24, 0]'),
    'too much data': (npy(np.zeros((24, 5), 'f4')) + b'\0', '480 bytes'),
    'too little data': (npy(np.zeros((24, 5), 'f4'))[:-1], '480 bytes'),
}  # fmt: skip


@pytest.mark.parametrize('attack', IN_NPZ, ids=str)
def test_array_of_npz(seeds, tmp_path, attack):
    value, word = IN_NPZ[attack]
    rows = members(seeds['official']) | {f'{HEAD}.npy': value}
    kind = zipfile.ZIP_DEFLATED if len(attack) % 2 else zipfile.ZIP_STORED
    refused(zipped(tmp_path / 'a.npz', rows.items(), kind), HEAD, word)
    assert not os.path.exists('/tmp/vit_jax_was_here')


NAMES = ['../up', 'a/../../b', '/etc/passwd', '\\\\host\\x', 'a\nb', 'a\x1b[2Jb', '', 'a' * 600,
         '\u202egpj', 'encoder\x7f']  # fmt: skip


@pytest.mark.parametrize('name', NAMES, ids=ascii)
def test_names(seeds, tmp_path, name):
    one = npy(np.zeros(3, 'f4'))
    refused(zipped(tmp_path / 'a.npz', [*members(seeds['official']).items(), (f'{name}.npy', one)]),
            'is refused')  # fmt: skip
    (tmp_path / 'a.safetensors').write_bytes(
        safetensors({name: dict(dtype='F32', shape=[3], data_offsets=[0, 12])}, bytes(12))
    )
    refused(tmp_path / 'a.safetensors', 'is refused')


@pytest.mark.parametrize('name', [f'{HEAD}.npy', HEAD])
def test_names_twice(seeds, tmp_path, name):
    rows = members(seeds['official'])
    path = zipped(tmp_path / 'a.npz', [*rows.items(), (name, rows[f'{HEAD}.npy'])])
    refused(path, HEAD, 'twice')


@pytest.mark.parametrize('format', fuzz_files.FORMATS)
def test_arrays_missing_extra_or_of_another_rank(seeds, tmp_path, format):
    """Of many arrays of the file in turn, but for those that a model may do without."""
    folder, original = seeds[format].is_dir(), seeds[format]
    original = original / 'model.safetensors' if folder else original
    with files.open_arrays(original) as arrays:
        arrays = {name: array.read(name) for name, array in arrays.items()}
    path = tmp_path / original.name

    def write(changed):
        save_file(changed, path) if folder else np.savez(path, **changed)

    for name in sorted(arrays)[::7]:
        empty = np.zeros((0,) * arrays[name].ndim, 'f4')
        changes = [{name: arrays[name][..., None]}, {name: empty}]
        if not re.search(r'^cls$|pos_embed|(qkv|query|key|value|patch_embed.proj)\.bias', name):
            changes.append({})
        for change in changes:
            write({n: a for n, a in arrays.items() if n != name} | change)
            with pytest.raises(UserError, match=str(path)) as error:
                load.read(path, num_heads=3)
            message = str(error.value)
            assert 'array' in message and '\n' not in message and len(message) < 500, message
    prefix = 'params/' if format == 'big_vision' else ''
    write(arrays | {f'{prefix}extra': np.zeros(3, 'f4')})
    refused(path, 'extra', num_heads=3)
    os.remove(path)


def patched(content, signature, offset, value, which=0):
    """A zip's bytes with a number of its n-th record of a kind replaced."""
    at = -1
    for _ in range(which + 1):
        at = content.index(signature, at + 1)
    return content[: at + offset] + value + content[at + offset + len(value) :]


CENTRAL, END, LOCAL = b'PK\x01\x02', b'PK\x05\x06', b'PK\x03\x04'
BROKEN_ZIPS = {  # what is done to the bytes of a valid .npz
    'wrong checksum': lambda b: patched(b, CENTRAL, 16, b'abcd'),
    'a byte of the data': lambda b: b[:400] + bytes([b[400] ^ 1]) + b[401:],
    'terabytes claimed': lambda b: patched(b, CENTRAL, 24, b'\xff\xff\xff\x7f'),
    'more than the file has': lambda b: patched(b, CENTRAL, 20, b'\xff\xff\x00\x00'),
    'one in another': lambda b: patched(b, CENTRAL, 42, bytes(4), which=1),
    'encrypted': lambda b: patched(b, CENTRAL, 8, b'\x01\x00'),
    'compressed by 99': lambda b: patched(b, CENTRAL, 10, b'\x63\x00'),
    'a directory of gigabytes': lambda b: patched(b, END, 12, b'\x00\x00\x00\x7f'),
    'a directory elsewhere': lambda b: patched(b, END, 16, b'\x00\x00\x00\x7f'),
    'no end': lambda b: b[:-30],
    'half': lambda b: b[: len(b) // 2],
    'no start': lambda b: b[500:],
    'empty': lambda b: b'',
    'zeros': lambda b: bytes(10_000),
    'text': lambda b: b'<html>404</html>',
    'no arrays': lambda b: b'PK\x05\x06' + bytes(18),
}


@pytest.mark.parametrize('attack', BROKEN_ZIPS)
def test_npz(seeds, tmp_path, attack):
    path = tmp_path / 'a.npz'
    path.write_bytes(BROKEN_ZIPS[attack](seeds['official'].read_bytes()))
    refused(path)


def test_members_that_share_their_bytes(tmp_path):
    """As in zip bombs without repetition: the data of two members is the same (USENIX WOOT 19)."""
    value = npy(np.zeros(100, 'f4'))

    def header(name, extra, signature=LOCAL, before=b'', after=b''):
        numbers = struct.pack('<HHHHHIIIHH', 20, 0, 0, 0, 33, zipfile.crc32(value), len(value),
                              len(value), len(name), extra)  # fmt: skip
        return signature + before + numbers + after + name

    inner = header(b'b.npy', 0)
    start = header(b'a.npy', 600 + len(inner)) + bytes(600)
    directory = b''.join(
        header(name, 0, CENTRAL, b'\x14\x00', bytes(10) + struct.pack('<I', at))
        for name, at in ((b'a.npy', 0), (b'b.npy', len(start)))
    )
    body = start + inner + value
    end = END + struct.pack('<HHHHIIH', 0, 0, 2, 2, len(directory), len(body), 0)
    (tmp_path / 'a.npz').write_bytes(body + directory + end)
    assert len(members(tmp_path / 'a.npz')) == 2  # the zip is sound
    refused(tmp_path / 'a.npz', 'array a ', 'not its own')


NUMBERS = {  # names that ask for a list of all numbers below, or for one that is none
    'Transformer/encoderblock_999999999999/x': 'encoderblock_2',
    'Transformer/encoderblock_0/MlpBlock_0/Dense_²/bias': 'Dense_²',
    'Transformer/encoderblock_02/MlpBlock_0/Dense_0/bias': '',
    'block1000000000/x': 'block1',
}


@pytest.mark.parametrize('name', NUMBERS)
def test_numbers_in_names(seeds, tmp_path, name):
    rows = members(seeds['official']) | {f'{name}.npy': npy(np.zeros(3, 'f4'))}
    if name.startswith('block'):
        rows['conv_root/kernel.npy'] = npy(np.zeros((7, 7, 3, 64), 'f4'))
    refused(zipped(tmp_path / 'a.npz', rows.items()), NUMBERS[name])


def test_sizes_that_no_model_has(seeds, tmp_path):
    value = npy(np.zeros(3, 'f4'))
    rows = members(seeds['official']) | {'conv_root/kernel.npy': npy(np.zeros((7, 7, 3, 7), 'f4'))}
    refused(zipped(tmp_path / 'a.npz', rows.items()), 'cannot be built')
    many = rows | {f'block{i}/unit1/x.npy': value for i in range(1, 200)}
    refused(zipped(tmp_path / 'a.npz', many.items()), 'block5/')
    many = rows | {f'block1/unit{i}/x.npy': value for i in range(1, 200)}
    refused(zipped(tmp_path / 'a.npz', many.items()), 'block1/')


@pytest.mark.parametrize('heads', [0, -3, 5, 2, 'x', 1.5, True, 10**30, [3]], ids=str)
def test_heads_that_contradict(seeds, heads):
    for format in ('official', 'hf'):
        if not (format == 'hf' and heads == 2):  # fused weights fit any number that divides
            refused(seeds[format], num_heads=heads)


def entry(**changes):
    return dict(dtype='F32', shape=[2, 2], data_offsets=[0, 16]) | changes


LENGTH = (2**63).to_bytes(8, 'little')
SAFETENSORS = {  # (bytes, what the message says)
    'a header of 2 ** 63 bytes': (LENGTH + b'{}', '9,223,372,036,854,775,808'),
    'a header longer than the file': (b'\x11' + bytes(7) + b'{}', '17'),
    'a header that is too long': (safetensors(b'{}' + b' ' * 11_000_000), 'refused'),
    'an empty file': (b'', 'header'),
    'three bytes': (b'abc', 'header'),
    'no JSON': (safetensors(b'{"a": nope}'), 'header'),
    'no text': (safetensors(b'\xff\xfe{}'), 'header'),
    'a list': (safetensors([1]), 'not an object'),
    'a text': (safetensors('x'), 'not an object'),
    'nothing': (safetensors({}), 'no arrays'),
    'deep nesting': (safetensors(b'{"a":' * 200_000 + b'1' + b'}' * 200_000), 'header'),
    'a huge number': (safetensors(b'{"a": ' + b'1' * 5000 + b'}'), 'header'),
    'names twice': (safetensors(b'{"a": {}, "a": {}}'), 'twice'),
    'fields twice': (safetensors(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), 'twice'),
    'overlap': (
        safetensors({'a': entry(), 'b': entry(data_offsets=[8, 24])}, bytes(24)), 'array b'),
    'the same place': (safetensors({'a': entry(), 'b': entry()}, bytes(16)), 'array b'),
    'a gap': (safetensors({'a': entry(data_offsets=[4, 20])}, bytes(20)), 'array a'),
    'beyond the end': (safetensors({'a': entry()}, bytes(15)), '15'),
    'bytes left over': (safetensors({'a': entry()}, bytes(17)), '17'),
    'backwards': (safetensors({'a': entry(data_offsets=[16, 0])}, bytes(16)), 'array a'),
    'a negative offset': (safetensors({'a': entry(data_offsets=[-16, 0])}, bytes(16)), 'array a'),
    'offsets that are no numbers': (
        safetensors({'a': entry(data_offsets=[0.0, 16.0])}, bytes(16)), 'array a'),
    'one offset': (safetensors({'a': entry(data_offsets=[16])}, bytes(16)), 'array a'),
    'an offset True': (
        safetensors({'a': entry(dtype='U8', shape=[1], data_offsets=[False, True])}, b'x'),
        'array a'),
    'terabytes': (safetensors({'a': entry(shape=[10**6, 10**6])}, bytes(16)), 'array a'),
    'terabytes with their offsets': (
        safetensors({'a': entry(shape=[10**12], data_offsets=[0, 4 * 10**12])}, bytes(16)),
        '4,000,000,000,000'),
    'more than 64 bits count': (
        safetensors({'a': entry(shape=[2**40] * 3, data_offsets=[0, 2**122])}), 'impossible'),
    'a product of millions of digits': (
        safetensors({'a': entry(shape=[10**4000] * 2000)}, bytes(16)), 'impossible'),
    'a negative axis': (safetensors({'a': entry(shape=[-2, -2])}, bytes(16)), 'impossible'),
    'an axis 2.0': (safetensors({'a': entry(shape=[2.0, 2])}, bytes(16)), 'impossible'),
    'an axis True': (safetensors({'a': entry(shape=[True, 4])}, bytes(16)), 'impossible'),
    'a shape in a shape': (safetensors({'a': entry(shape=[[4]])}, bytes(16)), 'impossible'),
    'a shape that is text': (safetensors({'a': entry(shape='22')}, bytes(16)), 'array a'),
    'a shape that is an object': (safetensors({'a': entry(shape={})}, bytes(16)), 'array a'),
    '40 axes': (safetensors({'a': entry(shape=[1] * 39 + [4])}, bytes(16)), 'impossible'),
    'no shape': (
        safetensors({'a': {'dtype': 'F32', 'data_offsets': [0, 16]}}, bytes(16)), 'array a'),
    'an entry that is none': (safetensors({'a': None}), 'array a'),
    'an entry that is text': (safetensors({'a': 'shape dtype data_offsets'}), 'array a'),
    'an unknown dtype': (safetensors({'a': entry(dtype='F33')}, bytes(16)), "'F33'"),
    'a dtype of megabytes': (safetensors({'a': entry(dtype='F' * 10**6)}, bytes(16)), 'array a'),
    'a dtype that is a number': (safetensors({'a': entry(dtype=32)}, bytes(16)), 'array a'),
    'another family': (safetensors({'a': entry()}, bytes(16)), 'no known family'),
}  # fmt: skip


@pytest.mark.parametrize('attack', SAFETENSORS)
def test_safetensors(tmp_path, attack):
    content, word = SAFETENSORS[attack]
    (tmp_path / 'a.safetensors').write_bytes(content)
    refused(tmp_path / 'a.safetensors', word)


@pytest.mark.parametrize('dtype', ['I32', 'U8', 'BOOL', 'F8_E4M3', 'C64', 'NaN', 'inf', 'BF16 NaN'])
@pytest.mark.parametrize('format', ['timm', 'hf'])
def test_array_of_safetensors(seeds, tmp_path, format, dtype):
    header, data = parted((seeds[format] / 'model.safetensors').read_bytes())
    name = {'timm': 'head.weight', 'hf': 'vit.layernorm.weight'}[format]
    begin, end = header[name]['data_offsets']
    value = {'NaN': np.float32(np.nan), 'inf': np.float32(np.inf)}.get(dtype)
    if value is not None:
        data = data[:begin] + value.tobytes() + data[begin + 4 :]
    else:
        kind = dtype.split()[0]
        bad = b'\xc0\x7f' * (math_prod(header[name]['shape']) * files.SIZES[kind] // 2)
        data = data[:begin] + bad + data[end:]
        for row in header.values():
            if 'data_offsets' in row:
                row['data_offsets'] = [
                    n + (len(bad) - end + begin) * (n >= end) for n in row['data_offsets']
                ]
        header[name]['dtype'] = kind
    (tmp_path / 'a.safetensors').write_bytes(safetensors(header, data))
    word = 'finite' if 'N' in dtype or value is not None else 'which no weight has'
    refused(tmp_path / 'a.safetensors', name.removeprefix('vit.'), word, num_heads=3)


def math_prod(shape):
    return int(np.prod(shape))


@pytest.mark.parametrize('format', fuzz_files.FORMATS)
def test_truncated_files(seeds, tmp_path, format):
    path = seeds[format]
    path = path / 'model.safetensors' if path.is_dir() else path
    content = path.read_bytes()
    for count in [*range(0, 64, 7), *range(64, len(content), len(content) // 20), len(content) - 1]:
        (tmp_path / path.name).write_bytes(content[:count])
        with pytest.raises(UserError, match=str(tmp_path)):
            load.read(tmp_path / path.name, num_heads=3)


@pytest.mark.parametrize('name', ['a.npz', 'a.safetensors', 'folder/model.safetensors', 'folder'])
@pytest.mark.parametrize('kind', ['folder', 'pipe', 'loop', 'nowhere', 'device'])
def test_what_is_no_file(tmp_path, name, kind):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    links = dict(loop=path, nowhere='/nowhere', device='/dev/zero')
    if kind in links:
        path.symlink_to(links[kind])
    else:
        {'folder': os.mkdir, 'pipe': os.mkfifo}[kind](path)
    refused(tmp_path / name.split('/')[0])


NO_JSON = [b'', b'{', b'nope', b'[]', b'"x"', b'null', b'1', b'\xff\xfe', b'[' * 100_000,
           b'{"a": ' + b'1' * 5000 + b'}', b'{}' + b' ' * 10_000_000]  # fmt: skip


@pytest.mark.parametrize('content', NO_JSON, ids=lambda c: repr(c[:6]))
@pytest.mark.parametrize(
    'file', ['timm/config.json', 'timm/run_config.json', 'hf/config.json',
             'hf/preprocessor_config.json']
)  # fmt: skip
def test_json_that_is_none(seeds, tmp_path, file, content):
    folder, name = file.split('/')
    copy(seeds[folder], tmp_path)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, name, size=len(content) + 100_000)


@pytest.mark.parametrize('kind', ['folder', 'pipe', 'loop'])
def test_json_that_is_no_file(seeds, tmp_path, kind):
    copy(seeds['hf'], tmp_path)
    path = tmp_path / 'preprocessor_config.json'
    path.unlink()
    {'folder': path.mkdir, 'pipe': lambda: os.mkfifo(path),
     'loop': lambda: path.symlink_to(path)}[kind]()  # fmt: skip
    refused(tmp_path, path.name)


def copy(folder, to):
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())


HUGE, NAN = 10**400, float('nan')
FIELDS = {  # {file: {field: values that are wrong}}
    'hf/config.json': {
        'num_attention_heads': ['x', 0, 7, -3, 3.0, True, [3], {}, HUGE, 10**12, NAN],
        'hidden_act': [5, 'swish', ['gelu'], {'gelu': 1}, True, 'x' * 10**6, 'a\nb'],
        'image_size': [[1], [], [1, 2, 3], 'x', 0, -16, 1.5, True, {}, [16, '16'], [0, 0]],
        'id2label': [['a', 'b'], 'x', 5],
        'layer_norm_eps': ['1e-6', [1e-6], 0, -1, NAN, float('inf'), HUGE, True],
        'model_type': ['bert', 5, ['vit'], {}],
    },
    'hf/preprocessor_config.json': {
        'image_mean': [[0.5] * 2, [], ['a'] * 3, 'abc', [NAN] * 3, [HUGE] * 3, {}, [[0.5]] * 3, 5],
        'image_std': [[0.5] * 4, [0.0] * 3, [-1.0] * 3, [None] * 3, True],
    },
    'timm/config.json': {
        'architecture': [5, ['x'], {}],
        'model_args': [[1], 'x', 5, True],
        'pretrained_cfg': [[1], 'x', 5],
        'model_args.num_heads': ['x', 0, 7, -3, 3.0, True, [3], HUGE],
        'model_args.act_layer': [5, ['gelu'], {}, 'silly'],
        'model_args.global_pool': [5, ['avg'], {}, 'silly', 'map'],
        'model_args.img_size': ['x', [1], 0, [16, None], {}],
        'pretrained_cfg.mean': [['a', 'b', 'c'], [0.5] * 2, 'abc', {}, [NAN] * 3],
        'pretrained_cfg.std': [[0] * 3, 'abc', [0.5]],
        'pretrained_cfg.input_size': ['x', 5, {}, [3], [3, 'x', 16], [3, -16, 16]],
    },
}  # fmt: skip
CASES = [(file, field) for file, fields in FIELDS.items() for field in fields]


@pytest.mark.parametrize('file, field', CASES)
def test_fields_of_json(seeds, tmp_path, file, field):
    folder, name = file.split('/')
    copy(seeds[folder], tmp_path)
    config = json.loads((tmp_path / name).read_text())
    config.get('model_args', {}).pop('img_size', None)  # which stands before input_size
    *section, last = field.split('.')
    for value in FIELDS[file][field]:
        changed = json.loads(json.dumps(config))
        (changed[section[0]] if section else changed)[last] = value
        (tmp_path / name).write_text(json.dumps(changed))
        with pytest.raises(UserError, match=str(tmp_path)) as error:
            load.read(tmp_path)
        message = str(error.value)
        assert '\n' not in message and len(message) < 1000, message


def test_fields_of_json_that_are_null_or_absent(seeds, tmp_path):
    for file in FIELDS:
        folder, name = file.split('/')
        copy(seeds[folder], tmp_path)
        config = json.loads((tmp_path / name).read_text())
        for field in FIELDS[file]:
            if field.count('.') or field in ('model_args', 'num_attention_heads'):
                continue
            (tmp_path / name).write_text(json.dumps(config | {field: None}))
            load.read(tmp_path, values=False)
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    'change', [dict(image_size='x'), dict(image_size=[1]), dict(image_size=5.0), dict(config=[1]),
               dict(image_size=[-4, -4])]
)  # fmt: skip
def test_json_beside_an_npz(seeds, tmp_path, change):
    path = tmp_path / 'a.npz'
    path.write_bytes(seeds['official'].read_bytes())
    record = json.loads(seeds['official'].with_suffix('.json').read_text())
    path.with_suffix('.json').write_text(json.dumps(record | change))
    refused(path, *change)


CHILD = """
import resource, sys
import vit_jax
from vit_jax.errors import UserError
vit_jax.load(sys.argv[1])  # JAX has then what it needs
with open('/proc/self/statm') as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[2]),) * 2)
for path in sys.argv[3:]:
    try:
        vit_jax.load(path)
    except UserError as e:
        print(e)
"""


def lying(path):
    """An .npz that says of its members that they have no more bytes than the file."""
    content = path.read_bytes()
    at = content.index(CENTRAL)
    while at >= 0:
        size = struct.unpack_from('<I', content, at + 24)[0]
        small = struct.pack('<I', min(size, 100_000))
        content = content[: at + 24] + small + content[at + 28 :]
        at = content.find(CENTRAL, at + 1)
    path.write_bytes(content)
    return path


def test_bombs(seeds, tmp_path):
    """In a process that cannot have more than 100 MB beside what it takes for a good file."""
    rows = members(seeds['official'])
    zeros = npy(np.zeros((24, 1_250_000), 'f4'))  # 120 MB
    head = {f'{HEAD}.npy': zeros, 'head/bias.npy': npy(np.zeros(1_250_000, 'f4'))}
    brackets = b'{"a":[' + b'[],' * 1_000_000 + b'1]}'
    block = 'Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel.npy'
    wide = {  # each array is small, and the model that they tell of together is not
        'embedding/kernel.npy': npy(np.zeros((1, 1, 3, 90_000), 'f4')),
        block: npy(np.zeros((1, 300_000), 'f4')),
    }
    words = {
        zipped(tmp_path / 'deflated.npz', (rows | head).items(), zipfile.ZIP_DEFLATED):
            'claim to hold',
        zipped(tmp_path / 'wide.npz', (rows | wide).items()): 'the model needs',
        lying(zipped(tmp_path / 'bzip2.npz', (rows | head).items(), zipfile.ZIP_BZIP2)):
            'compressed in a way',
    }  # fmt: skip
    for attack in ('terabytes', 'nothing, of terabytes'):
        value, word = IN_NPZ[attack]
        path = zipped(tmp_path / f'{attack}.npz', (rows | {f'{HEAD}.npy': value}).items())
        words[path] = word
    content = {'brackets': (safetensors(brackets), 'entry for array a')} | SAFETENSORS
    for attack in ('brackets', 'terabytes with their offsets', 'a header of 2 ** 63 bytes'):
        path = tmp_path / f'{attack}.safetensors'
        path.write_bytes(content[attack][0])
        words[path] = content[attack][1]
    paths = list(words)
    assert sum(os.path.getsize(path) for path in paths) < 2e7
    done = subprocess.run(
        [sys.executable, '-c', CHILD, seeds['official'], str(100_000_000), *paths],
        capture_output=True, text=True, timeout=100,
        env=os.environ | {'MALLOC_ARENA_MAX': '1'},  # each arena of a thread would claim 64 MB
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(paths)
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        assert line.startswith(f'{path}: ') and words[path] in line.replace(str(path), ''), line


ROUNDED = {  # how the parameters are stored in the file
    'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16,
    'float64': np.float64, 'Fortran order': np.asfortranarray,
    'Fortran order, float16': lambda a: np.asfortranarray(a.astype(np.float16)),
}  # fmt: skip


@pytest.mark.parametrize('kind', ROUNDED)
@pytest.mark.parametrize('format', fuzz_files.FORMATS)
def test_what_is_legal_loads_bit_for_bit(seeds, tmp_path, format, kind):
    path, convert = seeds[format], ROUNDED[kind]
    expected = LOADED[path]
    if path.is_dir():
        copy(path, tmp_path)
        file = to = tmp_path / 'model.safetensors'
    else:
        file, to = path, tmp_path / 'a.npz'
    with files.open_arrays(file) as arrays:
        arrays = {n: convert(a.read(n)) for n, a in arrays.items()}
    if path.is_dir():
        contiguous = {n: np.ascontiguousarray(a) for n, a in arrays.items()}
        save_file(contiguous, to, metadata={'format': 'pt', 'note': 'ü' * 100})
        to = tmp_path
    elif format == 'big_vision':
        extra = {'opt/step': np.int64(3), 'opt/0/mu': np.zeros(0), 'chrono': np.float64(np.nan)}
        np.savez_compressed(to, **arrays, **extra)
    else:
        np.savez(to, **arrays)
    params = flatten_dict(vit_jax.load(to)[1], sep='/')
    assert params.keys() == expected.keys()
    for name, value in params.items():
        rounded = np.asarray(convert(np.asarray(expected[name]))).astype(np.float32)
        assert value.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(value), rounded, err_msg=name)


def test_mutations(tmp_path):
    """Whatever is done to a file, it loads or is refused in one line, with little memory."""
    counts = fuzz_files.fuzz(tmp_path, number=0, count=30)
    assert counts['tried'] == 30 and counts.get('arrays')


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_many_mutations(tmp_path):
    count = int(os.environ.get('VIT_JAX_FUZZ', '600'))
    counts = fuzz_files.fuzz(tmp_path, random.randrange(10**9), count=count)
    print(counts)
    assert counts['tried'] == count and counts.get('values')
