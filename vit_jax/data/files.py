"""Image files that a user names on a command line."""

import os

from etils import epath

from vit_jax.data import images, sources
from vit_jax.errors import UserError

DEFAULT_SIZE = 224  # pixels a side, for a model that fits any


def found(paths):
    """Image files, those inside of folders sorted."""
    files = []
    for name in paths:
        path = epath.Path(os.path.expanduser(name))
        if path.is_dir():
            suffixes = sources.SUFFIXES
            inside = [p for p in sorted(path.iterdir()) if p.name.lower().endswith(suffixes)]
            if not inside:
                raise UserError(f'no images in {path} ({", ".join(suffixes)})')
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f'no image {path}')
    return files


def pixels(path, view):
    """uint8 [H, W, 3] of an image file."""
    try:
        return view(images.read(path.read_bytes()), None)
    except images.Unreadable as e:
        raise UserError(f'unreadable image {path}: {e}') from e
