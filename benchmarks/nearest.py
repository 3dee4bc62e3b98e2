"""Names emoji of Twitter by the nearest picture of Google: python -m benchmarks.nearest.

What experiments/emoji.py is compared with. A picture of Twitter has the name of the picture of
Google to which it is nearest, among the emoji of the split: by Euclidean distance of pixels at
--side, or with --checkpoint by cosine of its encoder's outputs at --image_size. So the pictures of
Google are at hand, also of emoji that the experiment does not train on. Prints a JSON line: for
each split the recall at 1, 5 and 10, beside chance.
"""

import json

import jax
import numpy as np
from absl import app, flags
from PIL import Image

import vit_jax
from vit_jax.data import images, sources
from vit_jax.evaluators import retrieval

SIDE = flags.DEFINE_integer('side', 32, 'Side of the pictures whose pixels are compared.')
CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Whose outputs are compared.')
SIZE = flags.DEFINE_integer('image_size', 112, 'Side of the images that it reads.')
BATCH = 64
K = (1, 5, 10)


def pictures(split):
    """({captions: index}, PIL images) of a split of emoji."""
    records = sources.load(name='emoji', split=split, label=None).records
    every = [records[i] for i in range(len(records))]
    names = {tuple(map(str, one['captions'])): i for i, one in enumerate(every)}
    if len(names) != len(every):
        raise ValueError(f'{split} has two emoji of the same names')
    shown = [Image.fromarray(np.asarray(images.read(one['image']))) for one in every]
    return names, shown


def by_pixels(shown):
    small = [one.resize((SIDE.value, SIDE.value), Image.Resampling.BOX) for one in shown]
    return np.stack([np.asarray(one, np.float32).ravel() / 255 for one in small])


def by_outputs():
    """A function of images to the encoder's outputs [N, D] of unit length."""
    model, params = vit_jax.load(
        CHECKPOINT.value, part='encoder', image_size=SIZE.value, num_classes=0
    )
    apply = jax.jit(lambda x: model.apply({'params': params}, x)[1]['pre_logits'])

    def outputs(shown):
        parts = []
        for i in range(0, len(shown), BATCH):
            some = vit_jax.preprocess(
                model, shown[i : i + BATCH], image_size=SIZE.value, view='resize'
            )
            padded = np.pad(some, [(0, BATCH - len(some)), *[(0, 0)] * 3])
            parts.append(np.asarray(apply(padded))[: len(some)])
        whole = np.concatenate(parts)
        return whole / np.linalg.norm(whole, axis=1, keepdims=True)

    return outputs


def recalls(queries, answers, own):
    """{K: recall} of queries [N, D] whose own answers are at the indices `own` [N]."""
    left, right = (np.sum(x.astype(np.float64) ** 2, axis=1) for x in (queries, answers))
    near = 2 * queries.astype(np.float64) @ answers.T - left[:, None] - right
    counts = retrieval.count_ranks(near, own[:, None] == np.arange(len(answers)))
    return {k: float(np.mean(retrieval.chance(*counts, k))) for k in K}


def main(_):
    features = by_outputs() if CHECKPOINT.value else by_pixels
    line = {'compared': CHECKPOINT.value or f'pixels at {SIDE.value}'}
    for part in ('seen', 'unseen'):
        (names, google), (others, twitter) = (
            pictures(f'{house}_{part}') for house in ('google', 'twitter')
        )
        own = np.array([names[name] for name in others])
        line[part] = recalls(features(twitter), features(google), own)
        line[f'{part}_chance'] = {k: k / len(google) for k in K}
    print(json.dumps(line))


if __name__ == '__main__':
    app.run(main)
