"""Classification by the texts of classes, without training on them (arXiv:2103.00020 section 3.1).

Shapes: B batch, K classes, T templates, E dimensions of the space of images and texts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.data import mixture, prompts
from vit_jax.distributed.stop import Stop
from vit_jax.evaluators import Subject, classify, embeddings
from vit_jax.io.bounds import Positive, Prefetch, Rate, Size, Threads, Workers


class ZeroShot:
    """Measures how often the text of an image's class is the most similar one.

    A class has the mean of the embeddings of its label in all templates, each of unit length, at
    unit length (section 3.1.4). Metrics are those of evaluation `classify`: accuracy, top-5
    accuracy, loss and calibration error of a softmax over the classes, with the run's temperature.

    Args:
      source: the data set, see Data sets.
      image_size: size of the images in pixels: one number, or (height, width).
      batch_size: images, and texts, in a batch, over all devices and processes.
      view: how an image is cropped and resized, see Views.
      labels: texts of the classes, in their order; a file with one a line; or 'imagenet', the names
        that CLIP has for those of ImageNet. None: the names of the classes, with spaces for
        underscores.
      templates: texts with a place {} for the label; a file with one a line; or 'openai_80' or
        'openai_7', those of CLIP for ImageNet.
      canonical: whether labels and templates lose their punctuation and capitals, as in big_vision
        (evaluators/proj/image_text/prompt_engineering.py).
      tokenizer: an address as for vit_jax.tokenizer. None: that of the run.
      threads, workers, prefetch, tolerance: as in the section `data`.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        source: dict,
        image_size: Size,
        batch_size: Positive[int],
        view: str | dict = 'resize',
        labels: tuple[str, ...] | str | None = None,
        templates: tuple[str, ...] | str = ('a photo of a {}.',),
        canonical: bool = False,
        tokenizer: str | None = None,
        threads: Threads | None = None,
        workers: Workers = 0,
        prefetch: Prefetch = 8,
        tolerance: Rate = 0.0,
    ) -> None:
        embeddings.check_outputs(subject, 'image_embedding', 'text_embedding')
        classes = mixture.load(**source).classes
        self.labels = prompts.labels_of(labels, classes)
        self.templates, self.canonical = prompts.templates_of(templates), canonical
        self.tokenizer = embeddings.tokenizer_of(subject, tokenizer)
        self.embed = embeddings.text_embedder(subject, batch_size)
        logits = jax.ShapeDtypeStruct((1, len(classes)), jnp.float32)
        self.classify = classify.Classify(
            subject._replace(
                predict=partial(by_similarity, subject.predict), outputs={'logits': logits},
                names={'classes': classes}, settings={'loss': 'softmax'},
            ),
            source=source, image_size=image_size, batch_size=batch_size, view=view,
            threads=threads, workers=workers, prefetch=prefetch, tolerance=tolerance,
        )  # fmt: skip
        self.sources, self.metrics = self.classify.sources, self.classify.metrics

    def __call__(
        self,
        params: Any,
        stop: Stop | None = None,
        set_phase: Callable[[str], None] = lambda phase: None,
        advance: Callable[[int], None] = lambda images: None,
    ) -> dict[str, float] | None:
        """Measures {metric: mean}; returns None if `stop` becomes true.

        Calls `set_phase` and `advance` as `evaluators.totals` does.
        """
        ids = self.tokenizer(prompts.prompts(self.labels, self.templates, self.canonical))
        texts = self.embed(params, ids, stop, set_phase)
        if texts is None:
            return None
        weights = of_classes(texts, len(self.templates))
        return self.classify({'params': params, 'weights': weights}, stop, set_phase, advance)


zero_shot = ZeroShot  # by its name in a config
METRICS = classify.METRICS


def of_classes(texts: np.ndarray, count: int) -> np.ndarray:
    """Embeddings of classes, float32 [K, E], from those of `count` templates each [K T, E]."""
    means = texts.reshape(-1, count, texts.shape[-1]).astype(np.float64).mean(axis=1)
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    return (means / np.maximum(lengths, 1e-12)).astype(np.float32)


def by_similarity(
    predict: Callable, params: dict[str, Any], batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Logits [B, K] of images: cosines with the classes' `weights` [K, E], times the temperature.

    Args:
      predict: that of the objective.
      params: its `params`, and `weights`.
      batch: images.
    """
    out = predict(params['params'], {'image': batch['image']})
    cosines = jnp.matmul(out['image_embedding'], params['weights'].T, precision='highest')
    return {'logits': cosines * out['temperature'][:, None]}
