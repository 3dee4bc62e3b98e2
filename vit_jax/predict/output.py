"""What the command prints and writes beside its results: progress, tables, files of flags."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.progress import Bar
from vit_jax.io.text import printable


def pictures_of(paths: Sequence[str], out: str, force: bool) -> dict[str, pathlib.Path]:
    """{image: PNG to write} of --out; raises UserError if one can't be written.

    With `force` files that exist are replaced.
    """
    if out.endswith('.png') and len(paths) == 1:
        check_output('out', out, force, '.png')
        return {paths[0]: pathlib.Path(out).absolute()}
    if pathlib.Path(out).suffix or '://' in out:
        raise UserError(
            f'--out={out}: name a local .png file for one image, a folder for several, or an .npz'
        )
    folder, found = storage.make_folder(pathlib.Path(out).absolute()), {}
    for path in paths:
        stem = pathlib.Path(path).stem
        picture = folder / f'{stem}.png'
        if picture in found.values():
            picture = folder / f'{stem}-{len(found)}.png'
        storage.check_free(picture, force)
        found[path] = picture
    return found


@contextlib.contextmanager
def counted(total: int) -> Iterator[Callable[[Iterator], Iterator[tuple[Any, Any]]]]:
    """Yields a function that passes on those of `predicted` that could be read.

    Others are reported on stderr; at the end there is a UserError if there were any. That of a
    single image is raised as it is.
    """
    failed = []

    def usable(pairs):
        with progress(total) as advance:
            for key, outputs in pairs:
                if not isinstance(outputs, UserError):
                    yield key, outputs
                elif total == 1:
                    raise outputs
                else:
                    print(f'skipped: {printable(outputs)}', file=sys.stderr)
                    failed.append(key)
                advance(1)

    yield usable
    if failed:
        raise UserError(f'{len(failed):,} of {total:,} images cannot be read')


def check_output(flag: str, path: str, force: bool, suffix: str = '.npz') -> None:
    """Raises UserError if the file that a flag names can't be written, before any computation."""
    if not path.endswith(suffix) or '://' in path:
        raise UserError(f'--{flag}={path}: name a local file that ends in {suffix}')
    path = pathlib.Path(path).absolute()
    storage.check_free(path, force)
    storage.prepare_file(path)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(count)`; shows a bar if stderr is a terminal and stdout is not."""
    if total == 1 or sys.stdout.isatty() or not sys.stderr.isatty():
        yield lambda count: None
        return
    with Bar('images', total) as bar:
        yield bar.add


def print_rows(path: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints the name of an image and a table."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.print(printable(path), soft_wrap=True)
    console.print(table if rows else '  nothing')
