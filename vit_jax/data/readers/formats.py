"""File formats of images."""

from PIL import features

SUFFIXES = {  # suffix: Pillow's name of the format; contents decide, names do not
    'jpg': 'JPEG', 'jpeg': 'JPEG', 'jpe': 'JPEG', 'jfif': 'JPEG', 'png': 'PNG', 'gif': 'GIF',
    'bmp': 'BMP', 'webp': 'WEBP', 'tif': 'TIFF', 'tiff': 'TIFF', 'ppm': 'PPM', 'pgm': 'PPM',
    'pbm': 'PPM', 'pnm': 'PPM', **({'avif': 'AVIF'} if features.check('avif') else {}),
}  # fmt: skip
