"""TFDS builder of scenes for segmentation and detection: Fashion-MNIST's articles on photographs.

The articles are those of Debian's package dataset-fashion-mnist (arXiv:1708.07747), the backgrounds
windows of scikit-learn's two sample photographs. Every mask and box is exact, since it is drawn.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.data.builders.fashion_mnist_debian import (
    fashion_mnist_debian_dataset_builder as fashion,
)
from vit_jax.errors import UserError

SIZE = 96  # side of a scene in pixels
SCENES = {'train': 5000, 'test': 1000}
PARTS = {'train': 'train', 'test': 't10k'}  # of Fashion-MNIST
REGIONS = {'train': slice(0, 400), 'test': slice(424, 640)}  # columns of the photographs
MOST = 5  # articles in a scene
WINDOW = 64, 200  # side of a background's window in the photograph, in pixels
SCALE = 0.9, 2.0  # of an article of 28 x 28 pixels
DEGREES = 40.0  # an article is turned by up to so many, either way
LEAST = 0.35  # of an article's pixels that must be visible
FAINT = 24  # grey values below are no part of an article
SPECK, HOLE = 12, 8  # most pixels of a speck outside, and of a hole that is filled
SEED = 2012


class Scene(NamedTuple):
    """A scene: image uint8 [S, S, 3], number of the article at each pixel, classes of articles.

    Attributes:
      image: the picture.
      instances: uint8 [S, S], k + 1 where article k is visible, 0 on the background. Articles with
        higher numbers cover those with lower ones.
      labels: int [N], class of each article.
    """

    image: np.ndarray
    instances: np.ndarray
    labels: np.ndarray

    def mask(self) -> np.ndarray:
        """uint8 [S, S]: 0 on the background, 1 + class on an article."""
        return np.append(0, self.labels + 1).astype(np.uint8)[self.instances]

    def boxes(self) -> np.ndarray:
        """float [N, 4]: (y0, x0, y1, x1) of what is visible of each article, in shares of S."""
        found = []
        for k in range(len(self.labels)):
            rows, columns = np.nonzero(self.instances == k + 1)
            found.append([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
        return np.array(found) / len(self.instances)


class Builder(tfds.core.GeneratorBasedBuilder):
    """5,000 scenes for training and 1,000 for tests, of one to five articles.

    The splits share no article and no part of a photograph.
    """

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        one = dict(shape=(SIZE, SIZE, 1), encoding_format='png')
        return self.dataset_info_from_configs(
            description='Articles of Fashion-MNIST on photographs, with exact masks and boxes.',
            homepage='https://github.com/zalandoresearch/fashion-mnist',
            features=tfds.features.FeaturesDict({
                'image': tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format='png'),
                'mask': tfds.features.Image(**one),
                'instances': tfds.features.Image(**one),
                'objects': tfds.features.Sequence({
                    'bbox': tfds.features.BBoxFeature(),
                    'label': tfds.features.ClassLabel(names=fashion.CLASSES),
                }),
            }),
        )

    def _split_generators(self, dl_manager):
        if not fashion.FOLDER.is_dir():
            raise UserError(
                f'fashion_scenes reads {fashion.FOLDER}, which is not there; '
                'install it with: apt-get install dataset-fashion-mnist'
            )
        return {split: self._generate_examples(split) for split in SCENES}

    def _generate_examples(self, split):
        for i, scene in enumerate(scenes(split, SCENES[split])):
            boxes = [tfds.features.BBox(*map(float, box)) for box in scene.boxes()]
            yield i, {
                'image': Image.fromarray(scene.image),
                'mask': Image.fromarray(scene.mask()),
                'instances': Image.fromarray(scene.instances),
                'objects': [
                    {'bbox': box, 'label': int(label)}
                    for box, label in zip(boxes, scene.labels, strict=True)
                ],
            }


def scenes(split: str, count: int) -> Iterator[Scene]:
    """Yields the first scenes of a split, each a function of the split and its number."""
    from sklearn.datasets import load_sample_images

    articles, labels = (
        fashion.read_idx(fashion.FOLDER / f'{PARTS[split]}-{kind}-ubyte.gz')
        for kind in ('images-idx3', 'labels-idx1')
    )
    photographs = [photo[:, REGIONS[split]] for photo in load_sample_images().images]
    for i in range(count):
        # RandomState's stream is frozen
        rng = np.random.RandomState([SEED, list(SCENES).index(split), i])
        scene = None
        while scene is None:
            chosen = rng.randint(len(articles), size=rng.randint(1, MOST + 1))
            scene = compose(background(photographs, rng), articles[chosen], labels[chosen], rng)
        yield scene


def background(photographs: list[np.ndarray], rng: np.random.RandomState) -> np.ndarray:
    """A window of a photograph, resized, mirrored and tinted at random: float32 [S, S, 3]."""
    photo = photographs[rng.randint(len(photographs))]
    side = rng.randint(*WINDOW)
    y, x = (rng.randint(n - side + 1) for n in photo.shape[:2])
    window = Image.fromarray(photo[y : y + side, x : x + side])
    picture = np.float32(window.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return (picture[:, ::-1] if rng.randint(2) else picture) * rng.uniform(0.6, 1.0, 3)


def compose(
    canvas: np.ndarray, articles: np.ndarray, labels: np.ndarray, rng: np.random.RandomState
) -> Scene | None:
    """Draws articles uint8 [N, 28, 28] onto a canvas, one over the other.

    A pixel shows an article where it covers at least half of the pixel. None if too little of one
    is visible.
    """
    instances, areas = np.zeros((SIZE, SIZE), np.uint8), []
    for k, article in enumerate(articles):
        value, cover, area = moved(article, rng)
        tint = rng.uniform(0.35, 1.0, 3)
        tint *= rng.uniform(0.8, 1.0) / tint.max()
        canvas = canvas * (1 - cover[..., None]) + value[..., None] * tint
        instances[cover >= 0.5] = k + 1
        areas.append(area)
    visible = np.bincount(instances.ravel(), minlength=len(articles) + 1)[1:]
    if (visible < LEAST * np.array(areas)).any():
        return None
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Scene(image, instances, labels.astype(np.int64))


def silhouette(article: np.ndarray) -> np.ndarray:
    """Pixels of an article uint8 [28, 28]: bright ones, and dark specks within; bool [28, 28].

    Specks outside are left out, and holes as large as a bag's handle stay open.
    """
    from scipy import ndimage

    shape = article >= FAINT
    for value, most in ((True, SPECK), (False, HOLE)):  # of these pixels parts up to this size flip
        parts, _ = ndimage.label(shape == value)
        sizes = np.bincount(parts.ravel())
        small = (sizes <= min(most, sizes[1:].max(initial=0) - 1))[parts] & (parts > 0)
        shape = shape ^ small
    return shape


def moved(
    article: np.ndarray, rng: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray, float]:
    """Scales, turns, mirrors and places an article uint8 [28, 28] at random.

    Returns:
      (grey values times cover, [S, S]; cover, how much of each pixel belongs to it, [S, S];
      its area in pixels, what is outside of the scene included).
    """
    shape = silhouette(article)
    scale, angle = rng.uniform(*SCALE), np.deg2rad(rng.uniform(-DEGREES, DEGREES))
    mirrored = -1 if rng.randint(2) else 1
    centre = rng.uniform(0.1, 0.9, 2) * SIZE
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    to_article = np.diag([mirrored, 1]) @ turn / scale
    matrix = np.concatenate([to_article, (14 - to_article @ centre)[:, None]], axis=1)

    def drawn(values):
        # twice as large, then halved: smooth edges
        fine = matrix * [[0.5, 0.5, 1.0]]
        picture = Image.fromarray(np.float32(values)).transform(
            (2 * SIZE, 2 * SIZE), Image.Transform.AFFINE, fine.ravel(),
            Image.Resampling.BILINEAR,
        )  # fmt: skip
        return np.asarray(picture).reshape(SIZE, 2, SIZE, 2).mean((1, 3))

    return drawn(article * shape), drawn(shape), float(shape.sum() * scale**2)
