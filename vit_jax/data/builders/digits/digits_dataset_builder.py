"""TFDS builder of scikit-learn's handwritten digits: 1,797 images of 8 x 8, in 10 classes."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Builder(tfds.core.GeneratorBasedBuilder):
    """The split test is a fixed random fifth, drawn from NumPy's frozen RandomState stream."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return self.dataset_info_from_configs(
            description='Optical recognition of handwritten digits, as scikit-learn ships it.',
            homepage='https://archive.ics.uci.edu/dataset/80',
            features=tfds.features.FeaturesDict({
                'image': tfds.features.Image(shape=(8, 8, 1), encoding_format='png'),
                'label': tfds.features.ClassLabel(names=[str(i) for i in range(10)]),
            }),
            supervised_keys=('image', 'label'),
        )

    def _split_generators(self, dl_manager):
        order = np.random.RandomState(0).permutation(1797)
        return {'train': self._generate_examples(np.sort(order[359:])),
                'test': self._generate_examples(np.sort(order[:359]))}

    def _generate_examples(self, indices):
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i in indices:
            image = np.round(digits.images[i] * (255 / 16)).astype(np.uint8)
            yield int(i), {'image': Image.fromarray(image), 'label': int(digits.target[i])}
