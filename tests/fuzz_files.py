"""Tiny checkpoints of every format, and the mutations that `test_files` makes of them.

`python tests/fuzz_files.py SECONDS [SEED]` looks for a file that makes the readers fail otherwise
than by a UserError of one line, or take memory that the file does not have.
"""

import contextlib
import io
import json
import pathlib
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
import zipfile

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import vit_jax
from vit_jax import models
from vit_jax.convert import files, load
from vit_jax.errors import UserError

FORMATS = {  # what each can express of the tiny model
    'official': {},
    'big_vision': dict(pool='map'),
    'timm': dict(gelu='exact', interpolation='bicubic_antialias', registers=2,
                 registers_posemb=True),
    'hf': dict(gelu='exact', interpolation='bicubic', epsilon=1e-12),
}
ROOM = 2**29  # bytes of address space that a tiny file may take, of which JAX's own needs are most
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**12, 2**31, 2**63, -(2**63), 10**4000, 0.5, -1.5,
    1e300, float('nan'), float('inf'), '', 'x', '3', 'gelu', 'avg', '../a', 'a\nb', '\ud800',
    [], [1], [0, 4], [3, 8, 8], [0.5] * 2, [0.5] * 3, ['a', 'b', 'c'], [[[]]], [10**12] * 3,
    [2**62] * 9, [0] * 40, {}, {'a': 1}, {'0': 'x'},
]  # fmt: skip
SHAPES = [
    '()', '(0,)', '(-1,)', '(1,)', '(3, 4)', '(4, 3)', '(True, 12)', '(12.0,)', '(10**9,)', 'None',
    '(1000000000000,)', '(0, 1000000000000)', '(0x7fffffffffffffff, 4)', f'({"1, " * 70})',
    f'(0x{"f" * 8000},)',
]  # fmt: skip
KINDS = ['<f2', '<f8', '>f4', '<i4', '|b1', '<c8', '|O', '|S4', '<U3', '|V2', '<V2', '|V0', '<f16']


def parameters(model, size=16):
    """Random parameters of a model."""
    images = jax.ShapeDtypeStruct((1, size, size, len(model.mean)), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    rng = np.random.default_rng(0)
    flat = flatten_dict(shapes, sep='/')
    return unflatten_dict(
        {n: rng.standard_normal(x.shape, np.float32) for n, x in flat.items()}, sep='/'
    )


def tiny(**values):
    """A model whose files have a few kilobytes."""
    sizes = dict(num_classes=5, width=24, depth=2, num_heads=3, mlp_dim=48)
    return models.build('vit/4', **{**sizes, **values})


def checkpoint(folder, format):
    """Writes one; returns its path: a file or a folder."""
    model = tiny(**FORMATS[format])
    suffix = '.npz' if format in ('official', 'big_vision') else ''
    path = pathlib.Path(folder) / f'{format}{suffix}'
    vit_jax.save(path, model, parameters(model), format, classes=['a', 'b', 'c', 'd', 'e'])
    return path


def compressed(path):
    """The same .npz, deflated."""
    with np.load(path) as arrays:
        to = path.with_name(path.stem + '_compressed.npz')
        np.savez_compressed(to, **arrays)
    return to


def safetensors(header, data=b''):
    """A .safetensors file's bytes; the header is a dict or bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, 'little') + header + data


def parted(content):
    """(header, data) of a .safetensors file's bytes."""
    length = int.from_bytes(content[:8], 'little')
    return json.loads(content[8 : 8 + length]), content[8 + length :]


# Mutations: (content, draw) -> content, of which `draw(n)` is a number below n.


def place(content, draw):
    """A place in the content, mostly where its structure is."""
    marks = [m.start() for m in re.finditer(rb'PK|\x93NUMPY|[{\[]', content[:2000])]
    marks += [len(content) - min(len(content), 1500) + m.start()
              for m in re.finditer(rb'PK', content[-1500:])]  # fmt: skip
    if marks and draw(4):
        return min(marks[draw(len(marks))] + draw(48), len(content))
    return draw(len(content) + 1)


def flip(content, draw):
    at = place(content, draw)
    return content[:at] + bytes([(content[at : at + 1] or b'\0')[0] ^ (1 << draw(8))]) \
        + content[at + 1 :]  # fmt: skip


def overwrite(content, draw):
    at, width = place(content, draw), (1, 2, 4, 8)[draw(4)]
    number = (0, 1, 2**31, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), draw(2**16))[draw(6)]
    return content[:at] + (number % 2 ** (8 * width)).to_bytes(width, 'little') \
        + content[at + width :]  # fmt: skip


def remove(content, draw):
    at = place(content, draw)
    return content[:at] + content[at + 1 + draw(64) :]


def repeat(content, draw):
    at, start = place(content, draw), place(content, draw)
    return content[:at] + content[start : start + 1 + draw(200)] + content[at:]


def truncate(content, draw):
    return content[: place(content, draw)]


def members(content, draw):
    """An .npz whose members are changed, its checksums then right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            rows = [[m.filename, archive.read(m)] for m in archive.infolist()]
            kind = archive.infolist()[0].compress_type
    except Exception:  # an earlier mutation has broken it
        return content
    row, other = rows[draw(len(rows))], rows[draw(len(rows))]
    change = draw(6)
    if change == 0:
        row[0], other[0] = other[0], row[0]
    elif change == 1:
        rows.remove(row)
    elif change == 2:
        rows.append([('x.npy', row[0], '../' + row[0], row[0].replace('_0', '_²'),
                      row[0].replace('_0', '_999999999999'))[draw(5)], other[1]])  # fmt: skip
    elif change == 3:
        row[1] = renewed(row[1], rb"'shape': (\(.*?\))", SHAPES[draw(len(SHAPES))])
    elif change == 4:
        row[1] = renewed(row[1], rb"'descr': ('.*?')", repr(KINDS[draw(len(KINDS))]))
    else:
        kind = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)[draw(3)]
        row[1] = row[1][: draw(len(row[1]) + 1)] + bytes(draw(5000))
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', kind) as archive, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a name that is twice
        for name, value in rows:
            archive.writestr(name, value)
    return out.getvalue()


def renewed(content, pattern, text):
    """A .npy member with a field of its header replaced, the header's length then right again."""
    end = content.find(b'\n') + 1
    header = re.sub(pattern, lambda m: m[0].replace(m[1], text.encode()), content[10:end])
    return content[:8] + len(header).to_bytes(2, 'little') + header + content[end:]


def entries(content, draw):
    """A .safetensors file with its header changed."""
    try:
        header, data = parted(content)
    except Exception:  # an earlier mutation has broken it
        return content
    return safetensors(changed(header, draw), data)


def changed(value, draw):
    """JSON with one value replaced, taken away, or exchanged with its neighbour."""
    if not isinstance(value, (dict, list)) or not value or not draw(12):
        return VALUES[draw(len(VALUES))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, other, change = keys[draw(len(keys))], keys[draw(len(keys))], draw(8)
    value = value.copy()
    if change == 0:
        value.pop(key)
    elif change == 1:
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = changed(value[key], draw)
    return value


def document(content, draw):
    """A JSON file changed."""
    try:
        return json.dumps(changed(json.loads(content), draw)).encode()
    except ValueError:
        return content


BYTES = (flip, overwrite, remove, repeat, truncate)


def mutated(path, to, draw):
    """A copy of a checkpoint with one to three mutations, of its weights or of its JSON files."""
    if path.is_dir():
        shutil.copytree(path, to)
        inside = sorted(to.iterdir())
        file = to / 'model.safetensors' if draw(2) else inside[draw(len(inside))]
    else:
        file = to / path.name
        to.mkdir()
        shutil.copy(path, file)
    own = {'.npz': members, '.safetensors': entries, '.json': document}[file.suffix]
    content = file.read_bytes()
    for _ in range(1 + draw(3)):
        content = (own if draw(2) else BYTES[draw(len(BYTES))])(content, draw)
    file.write_bytes(content)
    return to if path.is_dir() else file


@contextlib.contextmanager
def limited(room=ROOM):
    """No more address space for this process than what it has and `room`."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(call):
    """The message of the UserError that a call raises, None without one; any other error passes."""
    try:
        call()
    except UserError as e:
        message = str(e)
        assert message and '\n' not in message and message.isprintable(), repr(message)
        assert len(message) < 2500 and 'MemoryError' not in message, message
        return message
    return None


def each_array(path):
    """Reads every array of a file as the readers do."""
    with files.open_arrays(path) as arrays:
        for name, array in arrays.items():
            refusal(lambda name=name, array=array: array.read(name))


def probe(path):
    """Reads a checkpoint in every way; the names of those that went through."""
    file = path / 'model.safetensors' if path.is_dir() else path
    with limited():
        passed = ['arrays'] if refusal(lambda: each_array(file)) is None else []
        if refusal(lambda: load.read(path, values=False)) is None:
            passed.append('model')
            if refusal(lambda: load.read(path)) is None:
                passed.append('values')
    return passed


def fuzz(folder, number, seconds=float('inf'), count=float('inf')):
    """{what went through: how often} of mutations for so long, or so many.

    Raises at the first failure.
    """
    seeds = [checkpoint(folder, format) for format in FORMATS]
    seeds.append(compressed(seeds[0]))
    for path in seeds:
        assert probe(path) == ['arrays', 'model', 'values'], path
    counts, end, last = {'tried': 0}, time.monotonic() + seconds, pathlib.Path(folder) / 'last'
    numbers = st.binary(min_size=40, max_size=40)

    def goes_on():
        return time.monotonic() < end and counts['tried'] < count

    def one(path, numbers):
        if not goes_on():
            return
        supply = iter(memoryview(numbers).cast('I'))
        rest = random.Random(numbers)  # for more numbers than hypothesis chose
        shutil.rmtree(last, ignore_errors=True)
        begun = time.monotonic()
        mutant = mutated(path, last, lambda n: next(supply, rest.getrandbits(32)) % n)
        for what in ('tried', *probe(mutant)):
            counts[what] = counts.get(what, 0) + 1
        assert time.monotonic() - begun < 120, f'{mutant} took {time.monotonic() - begun:.0f} s'

    while goes_on():
        number += 1
        case = given(st.sampled_from(seeds), numbers)(one)
        options = settings(
            max_examples=500, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        try:
            seed(number)(options(case))()
        except BaseException:
            print(f'seed {number - 1}; the file is {last}', file=sys.stderr)
            raise
    return counts


if __name__ == '__main__':
    start = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**9)
    print(fuzz(tempfile.mkdtemp(prefix='vit_jax_fuzz_'), start, seconds=float(sys.argv[1])))
