"""The order of the rooms: imports point down, in no circle; readers load no JAX."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'vit_jax'
# From the ground up: a module imports from its own room and from rows above its own. Modules named
# __main__ are commands, which may import anything.
LAYERS = (
    'errors', 'io', 'cli', 'models', 'optim', 'objectives', 'sharding', 'distributed', 'step',
    'data.readers', 'data', 'data.builders', 'data.prepare', 'run', 'convert', 'evaluators',
    'config', 'assembly', 'train', 'plan', 'tables', 'figures', 'export', 'evaluate', 'predict',
    'compare', 'sweep', 'main',
)  # fmt: skip
LIGHT = ('models', 'step', 'objectives', 'optim', 'sharding')  # need jax, flax and optax alone
HEAVY = ('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'tensorstore', 'grain', 'tensorflow', 'torch')


def modules():
    """{dotted name below vit_jax: path}; a folder's __init__ has the folder's name."""
    names = {}
    for path in PACKAGE.rglob('*.py'):
        parts = path.relative_to(PACKAGE).with_suffix('').parts
        names['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return names


MODULES = modules()


def room(name):
    """The row of LAYERS that a module belongs to; '' for the package itself."""
    known = [layer for layer in LAYERS if name == layer or name.startswith(f'{layer}.')]
    return max(known, key=len, default=name)


@functools.cache
def imported(path):
    """Modules of the package that a file imports, wherever in the file."""
    return list(imports(path))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith('vit_jax.'):
                below = name.removeprefix('vit_jax.')
                yield below if below in MODULES else below.rpartition('.')[0]


def is_command(name):
    return name.endswith('__main__')


def test_every_module_has_a_row():
    assert {room(name) for name in MODULES if name and not is_command(name)} <= set(LAYERS)
    top = [p for p in PACKAGE.iterdir() if p.suffix == '.py' or (p / '__init__.py').exists()]
    assert len(top) <= 26, sorted(p.name for p in top)


def test_imports_point_down():
    wrong = [
        f'{name} imports {other}'
        for name, path in MODULES.items() if name and not is_command(name)
        for other in imported(path)
        if other and room(other) != room(name)
        and LAYERS.index(room(other)) > LAYERS.index(room(name))
    ]  # fmt: skip
    assert not wrong, wrong


def test_no_files_import_each_other_in_a_circle():
    done = set()

    def follow(name, above):
        assert name not in above, [*above[above.index(name) :], name]
        if name not in done:
            for other in imported(MODULES[name]):
                if other:  # the package itself hands names on, when it is asked for them
                    follow(other, [*above, name])
            done.add(name)

    for name in MODULES:
        if name:
            follow(name, [])


def test_private_names_of_a_library_are_imported_in_one_place():
    modules = {name: path.read_text() for name, path in MODULES.items()}
    for library in ('jax', 'orbax.checkpoint'):
        form = re.compile(rf'\b{re.escape(library)}\._(?!_)')
        users = [name for name, text in modules.items() if form.search(text)]
        assert len(users) <= 1, users


def test_tests_import_helpers_and_no_other_tests():
    found = {path.name: imported_tests(path) for path in (ROOT / 'tests').glob('*.py')}
    wrong = {name: tests for name, tests in found.items() if tests}
    assert len(found) > 80 and not wrong, wrong


def imported_tests(path):
    """Names of files of tests that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [node.module or '' for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name for name in names if name.rpartition('.')[2].startswith('test_')}


@pytest.mark.parametrize('rooms, refused', [
    (['data.readers'], HEAVY), (LIGHT, ('orbax', 'tensorstore', 'grain', 'fsspec')),
])  # fmt: skip
def test_rooms_load_no_more_than_they_need(rooms, refused):
    names = [n for n in MODULES if room(n) in rooms and 'quantized' not in n]
    assert len(names) > 9
    text = (
        f'import importlib, sys\nfor name in {names}: importlib.import_module("vit_jax." + name)\n'
        f'print([name for name in {refused} if name in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', text], capture_output=True, text=True, cwd=ROOT, timeout=250
    )
    assert done.stdout.strip() == '[]', done.stdout + done.stderr
