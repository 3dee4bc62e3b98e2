"""Files of other libraries in tests/data, with the outputs that those libraries computed."""

import pathlib

DATA = pathlib.Path(__file__).with_name('data')
FIXTURES = sorted(p.name.removesuffix('.expected.npz') for p in DATA.glob('*.expected.npz'))


def location(name):
    """Where the checkpoint of a fixture is."""
    return DATA / name if (DATA / name).is_dir() else DATA / f'{name}.npz'
