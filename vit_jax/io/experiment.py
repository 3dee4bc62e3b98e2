"""Runs an experiment file: 'FILE' or 'FILE:ARG' to the nested dict that its get_config returns.

The file is the user's own Python. Whatever it raises becomes UserError: one line with the file, the
line and the exception, and below it the frames of the user's files alone.
"""

import functools
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

from vit_jax.errors import UserError, choices, shown
from vit_jax.io import storage

LIBRARIES = (
    '<', str(pathlib.Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')),
)  # fmt: skip


def read(path):
    """Reads an experiment file, 'FILE' or 'FILE:ARG', or a config.json, as a nested dict."""
    file, arg = split(path)
    if file.endswith('.json'):
        if arg:
            raise UserError(f'{file} takes no argument, not {arg!r}')
        return read_json(file)
    function = getattr(module(file), 'get_config', None)
    if not callable(function):
        raise UserError(f'experiment file {file} has no function get_config()')
    check_argument(file, function, arg)
    with_arg = (arg,) if arg else ()
    given = called(path, lambda: plain(function(*with_arg)))
    if not isinstance(given, dict):
        raise UserError(f'get_config of {file} returns {shown(given)}, not a ConfigDict')
    return given


def split(path):
    """Splits 'FILE:ARG' into (file, argument), which may have colons too; '' for no argument."""
    if re.match(r'\w+://', path):
        if not path.endswith('.json'):
            raise UserError(
                f'experiment file {path} is at an address, of which code is not run; copy it to '
                'this machine (a config.json may be at gs://)'
            )
        return path, ''
    places = [i for i, c in enumerate(path) if c == ':'] + [len(path)]
    for i in places:
        if pathlib.Path(path[:i]).is_file():
            return path[:i], path[i + 1 :]
    file = path[: places[0]]
    what = 'is a folder, no experiment file' if pathlib.Path(file).is_dir() else ''
    raise UserError(f'{file} {what}' if what else f'no experiment file {file}')


def read_json(path):
    """Reads the object in a config.json, on this machine or at gs://."""
    if not storage.is_remote(path):
        return storage.read_json(pathlib.Path(path))
    if not path.startswith('gs://'):
        raise UserError(f'{path} is not at gs://; download it first')
    storage.set_up()
    given = storage.read_json(epath.Path(path))
    if not given:
        raise UserError(f'no config in {path}')
    return given


def module(file):
    """Runs an experiment file anew and returns its module."""
    spec = importlib.util.spec_from_file_location('experiment', file)
    if spec is None:
        raise UserError(f'{file} is no experiment file: its name does not end in .py')
    found = importlib.util.module_from_spec(spec)
    called(file, lambda: spec.loader.exec_module(found))
    return found


class Component(NamedTuple):
    """A function that a config names, and the module of the function."""

    function: Callable
    module: Any

    def metrics(self, settings):
        """{metric: 'max' or 'min'} as its module declares: METRICS, or metrics(**settings)."""
        declared = getattr(self.module, 'METRICS', None)
        if declared is None:
            declared = getattr(self.module, 'metrics', lambda **settings: {})(**settings)
        return dict(declared)


def component(room, name, key):
    """The Component of a name: one of the package's, 'MODULE:FUNCTION' or 'FILE.py:FUNCTION'.

    `room` is where the package has such functions: a module, or a folder in which each file has one
    of its own name. Raises UserError, with the config's `key`, if there is none.
    """
    if not isinstance(name, str):
        raise UserError(f'config {key} is {shown(name)}, not a name')
    place, colon, attribute = name.rpartition(':')
    if not colon:
        known = of_package(room)
        if name not in known:
            raise UserError(
                f'config {key} is {shown(name)}; {choices(name, sorted(known))}, and your own as '
                'FILE.py:FUNCTION'
            )
        return known[name]
    try:
        found = user_module(place) if place.endswith('.py') else called(
            place, lambda: importlib.import_module(place)
        )
    except UserError as e:
        raise UserError(f'config {key} is {shown(name)}: {e}', several_lines=True) from e
    if not callable(getattr(found, attribute, None)):
        raise UserError(f'config {key} is {shown(name)}, but {place} has no function {attribute}')
    return Component(getattr(found, attribute), found)


@functools.cache
def of_package(room):
    """{name: Component} of a module or folder of the package."""
    package = importlib.import_module(room)
    if not hasattr(package, '__path__'):
        return {
            name: Component(f, package) for name, f in vars(package).items()
            if inspect.isfunction(f) and next(iter(inspect.signature(f).parameters), '') == 'source'
        }  # fmt: skip
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    modules = {name: importlib.import_module(f'{room}.{name}') for name in names}
    return {
        name: Component(getattr(module, name), module)
        for name, module in modules.items() if hasattr(module, name)
    }  # fmt: skip


@functools.cache
def user_module(file):
    """The module of a user's file, which is run once in this process."""
    if not pathlib.Path(file).is_file():
        raise UserError(f'no file {file}')
    return module(file)


def check_argument(file, function, arg):
    """Raises UserError unless get_config takes the argument, or needs none if there is none."""
    signature = inspect.signature(function)
    try:
        signature.bind(*([arg] if arg else []))
    except TypeError:
        names = list(signature.parameters)
        wrong = any(p.kind == p.KEYWORD_ONLY for p in signature.parameters.values())
        if not names:
            raise UserError(f'{file} takes no argument, not {arg!r}') from None
        if len(names) == 1 and not arg and not wrong:
            raise UserError(
                f'{file} needs an argument after a colon: {file}:{names[0].upper()}'
            ) from None
        raise UserError(
            f'get_config{signature} of {file} does not take one argument, the text after the colon'
        ) from None


def plain(value):
    """Converts ConfigDicts to dicts, at any depth."""
    if isinstance(value, (ConfigDict, FrozenConfigDict)):
        value = value.to_dict()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def called(path, function):
    """Calls the function; turns what it raises into UserError with the user's frames alone."""
    try:
        return function()
    except UserError as e:
        raise UserError(f'{path}: {e}') from e
    except (Exception, SystemExit) as e:
        raise UserError(told(path, e), several_lines=True) from e


def told(path, error):
    """Error as 'FILE, line 3: KeyError: ...', with the user's frames, or a syntax error's place."""
    found = traceback.TracebackException.from_exception(error)
    frames = [f for f in found.stack if not f.filename.startswith(LIBRARIES)]
    words = ' '.join(str(error).split()) if not isinstance(error, SyntaxError) else error.msg
    file, line = (frames[-1].filename, frames[-1].lineno) if frames else (path, None)
    below = traceback.format_list(frames)
    if isinstance(error, SyntaxError) and error.filename:
        file, line = error.filename, error.lineno
        below += list(found.format_exception_only())[:-1]
    where = file if line is None else f'{file}, line {line}'
    title = f'{where}: {type(error).__name__}: {words}'.rstrip(': ')
    return '\n'.join([title, *''.join(below).splitlines()])
