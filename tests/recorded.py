"""Files of other libraries in tests/data, with the outputs that those libraries computed."""

import functools
import pathlib
import tempfile

import noise

DATA = pathlib.Path(__file__).with_name('data')
FIXTURES = sorted(p.name.removesuffix('.expected.npz') for p in DATA.glob('*.expected.npz'))


@functools.cache
def location(name):
    """Where the checkpoint of a fixture is."""
    if (DATA / name / 'arrays.json').exists():
        return noise.write(DATA / name, pathlib.Path(tempfile.mkdtemp()) / name)
    return DATA / name if (DATA / name).is_dir() else DATA / f'{name}.npz'
