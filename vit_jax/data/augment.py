"""Views: (image uint8 [H, W, 3], rng, size=(height, width)) -> uint8 [height, width, 3].

A view draws whatever it needs from `rng` (numpy.random.Generator), so that it is a function of the
example and the generator alone; those of evaluation ignore it.
"""

import numpy as np
from PIL import Image


def crop_and_resize(image, box, size):
    """Box (y, x, height, width) of an image, resized with Pillow's antialiased bilinear filter."""
    y, x, h, w = box
    window = Image.fromarray(np.ascontiguousarray(image[y : y + h, x : x + w]))
    if window.size == size[::-1]:
        return np.asarray(window)
    return np.asarray(window.resize(size[::-1], Image.Resampling.BILINEAR))


def resize(image, rng, *, size):
    """The whole image, squeezed to the size."""
    return crop_and_resize(image, (0, 0, *image.shape[:2]), size)


def central(image, rng, *, size, crop: float = 0.875):
    """The largest central window of the size's aspect, its sides times `crop`, resized."""
    h, w = image.shape[:2]
    scale = crop * min(h / size[0], w / size[1])
    ch = min(max(round(size[0] * scale), 1), h)
    cw = min(max(round(size[1] * scale), 1), w)
    return crop_and_resize(image, ((h - ch) // 2, (w - cw) // 2, ch, cw), size)


def random_crop(image, rng, *, size, crop: float = 0.875, flip: bool = True):
    """A window as large as that of `central`, anywhere, resized, and mirrored by chance."""
    h, w = image.shape[:2]
    scale = crop * min(h / size[0], w / size[1])
    ch = min(max(round(size[0] * scale), 1), h)
    cw = min(max(round(size[1] * scale), 1), w)
    box = int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1)), ch, cw
    return flipped(crop_and_resize(image, box, size), rng, flip)


def random_box(shape, rng, *, area=(0.05, 1.0), aspect=(3 / 4, 4 / 3)):
    """A window (y, x, height, width) of an image [H, W] by area and aspect.

    The area's share is uniform, the aspect (width / height) log-uniform (arXiv:1409.4842
    section 6); after a hundred misses, the whole image.
    """
    h, w = shape
    for _ in range(100):
        pixels = rng.uniform(*area) * h * w
        ratio = np.exp(rng.uniform(*np.log(aspect)))
        ch, cw = round((pixels / ratio) ** 0.5), round((pixels * ratio) ** 0.5)
        if 0 < ch <= h and 0 < cw <= w:
            return int(rng.integers(h - ch + 1)), int(rng.integers(w - cw + 1)), ch, cw
    return 0, 0, h, w


def inception(
    image,
    rng,
    *,
    size,
    area: tuple = (0.05, 1.0),
    aspect: tuple = (3 / 4, 4 / 3),
    flip: bool = True,
):
    """A random box, resized, and mirrored by chance: the usual view of ImageNet training."""
    box = random_box(image.shape[:2], rng, area=area, aspect=aspect)
    return flipped(crop_and_resize(image, box, size), rng, flip)


def shift(image, rng, *, size, pixels: int = 1, flip: bool = False):
    """The image at the size, moved by up to `pixels` each way; black comes in at the border."""
    framed = np.zeros((size[0] + 2 * pixels, size[1] + 2 * pixels, 3), np.uint8)
    framed[pixels : pixels + size[0], pixels : pixels + size[1]] = resize(image, rng, size=size)
    y, x = rng.integers(2 * pixels + 1, size=2)
    return flipped(framed[y : y + size[0], x : x + size[1]], rng, flip)


def affine(
    image,
    rng,
    *,
    size,
    degrees: float = 10.0,
    scale: float = 0.1,
    shear: float = 0.0,
    pixels: float = 1.0,
    flip: bool = False,
):
    """The image at the size, turned, sheared, scaled and moved about its centre; black around it.

    Each is uniform: the angle in +-degrees, the logarithms of the scales of both axes in +-scale,
    the tangent of the shear in +-shear, the shift in +-pixels.
    """
    image = Image.fromarray(np.ascontiguousarray(resize(image, rng, size=size)))
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[1, rng.uniform(-shear, shear)], [0, 1]])
    # of offsets from the centre, (x, y)
    to_input = turn @ slant * np.exp(rng.uniform(-scale, scale, 2))
    centre = np.array(size[::-1]) / 2
    start = centre - to_input @ (centre + rng.uniform(-pixels, pixels, 2))
    matrix = np.concatenate([to_input, start[:, None]], axis=1).ravel()
    warped = image.transform(size[::-1], Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return flipped(np.asarray(warped), rng, flip)


def flipped(image, rng, flip):
    """Mirrored left to right by an even chance, if asked."""
    return image[:, ::-1] if flip and rng.integers(2) else image


VIEWS = {f.__name__: f for f in (resize, central, random_crop, inception, shift, affine)}
