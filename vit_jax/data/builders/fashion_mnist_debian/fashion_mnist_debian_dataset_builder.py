"""TFDS builder of Fashion-MNIST (arXiv:1708.07747), from Debian's package dataset-fashion-mnist."""

import gzip
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.errors import UserError

FOLDER = pathlib.Path('/usr/share/datasets/fashion-mnist')
CLASSES = ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat',
           'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot']


class Builder(tfds.core.GeneratorBasedBuilder):
    """70,000 grey images of 28 x 28 in 10 classes, with the published split.

    train_2k and test_1k are the first 2,000 and 1,000 published images of a split; TFDS itself
    stores a split in another order.
    """

    VERSION = tfds.core.Version('1.1.0')
    RELEASE_NOTES = {'1.1.0': 'Splits of the first images.'}

    def _info(self):
        return self.dataset_info_from_configs(
            description='Fashion-MNIST, as Debian ships it (MIT licence).',
            homepage='https://github.com/zalandoresearch/fashion-mnist',
            features=tfds.features.FeaturesDict({
                'image': tfds.features.Image(shape=(28, 28, 1), encoding_format='png'),
                'label': tfds.features.ClassLabel(names=CLASSES),
            }),
            supervised_keys=('image', 'label'),
        )

    def _split_generators(self, dl_manager):
        if not FOLDER.is_dir():
            raise UserError(
                f'fashion_mnist_debian reads {FOLDER}, which is not there; '
                'install it with: apt-get install dataset-fashion-mnist'
            )
        return {'train': self._generate_examples('train'),
                'test': self._generate_examples('t10k'),
                'train_2k': self._generate_examples('train', 2000),
                'test_1k': self._generate_examples('t10k', 1000)}

    def _generate_examples(self, part, count=None):
        images = read_idx(FOLDER / f'{part}-images-idx3-ubyte.gz')
        labels = read_idx(FOLDER / f'{part}-labels-idx1-ubyte.gz')
        for i, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True)):
            yield i, {'image': Image.fromarray(image), 'label': int(label)}


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads an IDX file to a uint8 array: two zero bytes, type 8, rank, big-endian sizes, data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b'\0\0\x08':
        raise UserError(f'{path} is no IDX file of bytes')
    rank = data[3]
    shape = np.frombuffer(data, '>i4', rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
