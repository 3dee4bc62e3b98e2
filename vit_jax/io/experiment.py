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
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from etils import epath
from ml_collections import ConfigDict, FrozenConfigDict

from vit_jax.errors import UserError, choices, shown
from vit_jax.io import storage

T = TypeVar('T')
# Beginnings of the names of files whose frames are not the user's.
LIBRARIES = (
    '<', str(pathlib.Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')),
)  # fmt: skip


def read(path: str) -> dict:
    """Reads an experiment file, 'FILE' or 'FILE:ARG', or a config.json, as a nested dict.

    Its keys are as the file has them, not checked.
    """
    file, arg = split(path)
    if file.endswith('.json'):
        if arg:
            raise UserError(f'{file} takes no argument, not {arg!r}')
        return read_json(file)
    function = getattr(run_file(file), 'get_config', None)
    if not callable(function):
        raise UserError(f'experiment file {file} has no function get_config()')
    check_argument(file, function, arg)
    with_arg = (arg,) if arg else ()
    given = call_user_code(path, lambda: to_dict(function(*with_arg)))
    if not isinstance(given, dict):
        raise UserError(f'get_config of {file} returns {shown(given)}, not a ConfigDict')
    return given


def split(path: str) -> tuple[str, str]:
    """Splits 'FILE:ARG' into (file, argument), which may have colons too; '' for no argument."""
    if re.match(r'\w+://', path):
        if not path.endswith('.json'):
            raise UserError(
                f'experiment file {path} is at an address, and only local code is run; copy it to '
                'this machine (a config.json may be at gs://)'
            )
        return path, ''
    places = [i for i, c in enumerate(path) if c == ':'] + [len(path)]
    for i in places:
        if pathlib.Path(path[:i]).is_file():
            return path[:i], path[i + 1 :]
    file = path[: places[0]]
    if pathlib.Path(file).is_dir():
        raise UserError(f'{file} is a folder, not an experiment file')
    raise UserError(f'no experiment file {file}')


def read_json(path: str) -> dict[str, Any]:
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


def run_file(file: str) -> ModuleType:
    """Runs a Python file of the user's and returns its module."""
    spec = importlib.util.spec_from_file_location('experiment', file)
    if spec is None:
        raise UserError(f'{file} is not an experiment file: its name does not end in .py')
    found = importlib.util.module_from_spec(spec)
    call_user_code(file, lambda: spec.loader.exec_module(found))
    return found


class Component(NamedTuple):
    """A function that a config names, and the module of the function."""

    function: Callable
    module: ModuleType

    def metrics(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """{metric: 'max' or 'min'} as its module declares: METRICS, or metrics(**settings)."""
        declared = getattr(self.module, 'METRICS', None)
        if declared is None:
            declared = getattr(self.module, 'metrics', lambda **settings: {})(**settings)
        return dict(declared)


def component(package: str, name: object, key: str) -> Component:
    """The Component of a name: one of the package's, 'MODULE:FUNCTION' or 'FILE.py:FUNCTION'.

    Args:
      package: folder of the package in which each file has a function of its own name.
      name: value of the config's `key`.

    Raises:
      UserError: there is no such function.
    """
    if not isinstance(name, str):
        raise UserError(f'config {key} is {shown(name)}, not a name')
    place, colon, attribute = name.rpartition(':')
    if not colon:
        known = package_components(package)
        if name not in known:
            raise UserError(
                f'config {key} is {shown(name)}; {choices(name, sorted(known))}, and your own as '
                'FILE.py:FUNCTION'
            )
        return known[name]
    try:
        found = user_module(place) if place.endswith('.py') else call_user_code(
            place, lambda: importlib.import_module(place)
        )
    except UserError as e:
        raise UserError(f'config {key} is {shown(name)}: {e}', several_lines=True) from e
    if not callable(getattr(found, attribute, None)):
        raise UserError(f'config {key} is {shown(name)}, but {place} has no function {attribute}')
    return Component(getattr(found, attribute), found)


@functools.cache
def package_components(package: str) -> dict[str, Component]:
    """{name: Component} of a folder of the package."""
    parent = importlib.import_module(package)
    names = [found.name for found in pkgutil.iter_modules(parent.__path__)]
    modules = {name: importlib.import_module(f'{package}.{name}') for name in names}
    return {
        name: Component(getattr(module, name), module)
        for name, module in modules.items() if hasattr(module, name)
    }  # fmt: skip


@functools.cache
def user_module(file: str) -> ModuleType:
    """The module of a user's file, which is run once in this process."""
    if not pathlib.Path(file).is_file():
        raise UserError(f'no file {file}')
    return run_file(file)


def check_argument(file: str, function: Callable, arg: str) -> None:
    """Raises UserError unless get_config can be called with the argument (none if it is '')."""
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


def to_dict(value: Any) -> Any:
    """Converts ConfigDicts to dicts, at any depth."""
    if isinstance(value, (ConfigDict, FrozenConfigDict)):
        value = value.to_dict()
    if isinstance(value, dict):
        return {key: to_dict(inner) for key, inner in value.items()}
    return type(value)(map(to_dict, value)) if type(value) in (list, tuple) else value


def call_user_code(path: str, function: Callable[[], T]) -> T:
    """Calls a function; turns what it raises into UserError with the user's frames alone."""
    try:
        return function()
    except UserError as e:
        raise UserError(f'{path}: {e}') from e
    except (Exception, SystemExit) as e:
        raise UserError(describe_error(path, e), several_lines=True) from e


def describe_error(path: str, error: BaseException) -> str:
    """Formats an error as 'FILE, line 3: KeyError: ...', and the user's frames below it."""
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
