"""Checks the entropy decoder of the extension `_jpeg` against that of libjpeg.

The extension calls its decoder, and leaves out blocks and rows that no pixel needs, through private
structs of libjpeg, whose layout no version promises. It may do so where the versions are tested
ones and two pictures get the same bits either way. Elsewhere libjpeg decodes: the pixels are equal,
the speed is about half.
"""

import io
import itertools
import multiprocessing
from types import ModuleType

import numpy as np
from absl import logging
from PIL import Image

# Versions of libjpeg-turbo to compile with, and the last year in the copyright of each, which is
# all that a loaded library tells.
TESTED = {
    '2.0.6': '2020', '2.1.2': '2021', '2.1.5': '2023', '2.1.5.1': '2023', '3.0.0': '2023',
    '3.0.4': '2024', '3.1.0': '2024', '3.1.3': '2025', '3.1.4.1': '2026', '3.2.0': '2026',
}  # fmt: skip
# Windows (y, x, height, width) of the picture, the denominator of its scale, and the size to which
# a window is resized. The last two skip pixels.
WINDOWS = (
    ((0, 0, 45, 75), 1, (45, 75)), ((18, 35, 11, 17), 1, (11, 17)), ((9, 0, 14, 30), 2, (14, 30)),
    ((0, 0, 45, 75), 1, (3, 4)), ((1, 2, 44, 70), 1, (2, 5)),
)  # fmt: skip


def is_exact(extension: ModuleType) -> bool:
    """Whether the extension's decoder may replace libjpeg's; logs why not."""
    reason = mismatch(extension)
    if reason and multiprocessing.parent_process() is None:  # worker processes would repeat it
        logging.warning('JPEGs are decoded at about half the speed: the extension %s', reason)
    return not reason


def mismatch(extension: ModuleType) -> str:
    """Explains why the extension's decoder cannot replace libjpeg's; '' if it can."""
    compiled, loaded = extension.versions()
    if compiled not in TESTED or loaded not in TESTED.values():
        tested = ', '.join(f'{version} ({year})' for version, year in TESTED.items())
        return (
            f'is compiled with libjpeg-turbo {compiled} and loads one of {loaded or "no year"}; '
            f'tested versions are {tested}'
        )
    for data, window in itertools.product((picture(), picture(progressive=True)), WINDOWS):
        own, libjpeg = (decode(extension, data, *window, own) for own in (True, False))
        if own is None or libjpeg is None or not np.array_equal(own, libjpeg):
            return f'makes other pixels than libjpeg-turbo {compiled}'
    return ''


def picture(**options: bool) -> bytes:
    """A JPEG with restarts, subsampled colours, and codes of all lengths, 45 x 75 pixels."""
    y, x, c = np.mgrid[:45, :75, :3]
    noise = np.random.default_rng(0).integers(0, 256, x.shape)
    image = np.where(x < 40, noise, (3 * x + 2 * y + 50 * c) % 256).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'JPEG', quality=95, restart_marker_blocks=4, **options)
    return file.getvalue()


def decode(
    extension: ModuleType, data: bytes, box: tuple, denominator: int, size: tuple, own: bool
) -> np.ndarray | None:
    """Pixels of a window, [*size, 3], without antialias; None if the data are refused."""
    out = np.empty((*size, 3), np.uint8)
    try:
        extension.view(data, out, box, (0, 0, *box[2:]), denominator, 0, False, False, own)
    except ValueError:
        return None
    return out
