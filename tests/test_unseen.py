"""Two towers name combinations that no caption of their training had: "a sneaker above a bag"."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from vit_jax import config, train
from vit_jax.data.builders.fashion_mnist_debian import (
    fashion_mnist_debian_dataset_builder as fashion,
)
from vit_jax.data.tokenizers import training
from vit_jax.distributed.stop import Stop
from vit_jax.run import workdir

WORDS = [name.replace('_', ' ') for name in fashion.CLASSES]
BOTH = list(itertools.product(range(10), repeat=2))
UNSEEN = [pair for pair in BOTH if pair[0] != pair[1] and sum(pair) % 5 == 0]
SEEN = [pair for pair in BOTH if pair not in UNSEEN]
PAIRS = SEEN + UNSEEN  # classes are counted to the highest label of a data set
CAPTIONS = [f'a {WORDS[a]} above a {WORDS[b]}' for a, b in PAIRS]
TOWER = dict(width=64, depth=2, num_heads=2, mlp_dim=128)


def write(folder, part, pairs, count, seed):
    """A folder of pictures of one article above another, with captions."""
    articles = fashion.read_idx(fashion.FOLDER / f'{part}-images-idx3-ubyte.gz')
    labels = fashion.read_idx(fashion.FOLDER / f'{part}-labels-idx1-ubyte.gz')
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), []
    of = [np.flatnonzero(labels == k) for k in range(10)]
    for i in range(count):
        pair = pairs[i % len(pairs)]
        image = np.concatenate([articles[rng.choice(of[k])] for k in pair])  # [56, 28]
        Image.fromarray(image).convert('RGB').save(folder / f'{i}.png')
        number = PAIRS.index(pair)
        rows.append({'file_name': f'{i}.png', 'text': CAPTIONS[number], 'label': number})
    (folder / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_unseen_pairs_of_articles_are_named_far_above_chance(tmp_path):
    if not fashion.FOLDER.is_dir():
        pytest.skip(f'{fashion.FOLDER} is not there')
    assert len(UNSEEN) == 18
    write(tmp_path / 'data/train', 'train', SEEN, 3000, 0)
    write(tmp_path / 'data/test', 't10k', UNSEEN, 360, 1)
    tokenizer = training.train(CAPTIONS, kind='bpe', vocab_size=300, length=20, lower=True)
    tokenizer.save(tmp_path / 'tokens')
    data = dict(name=str(tmp_path / 'data'))
    full = config.override(dict(
        seed=0, steps=400, report=dict(every=100),
        model=dict(name='vit/8', pool='map', num_classes=None, **TOWER),
        objective=dict(name='contrastive', text=dict(pool='map', **TOWER)),
        data=dict(task='image_text', source=data | {'label': None}, view='resize',
                  image_size=(32, 16), batch_size=64, tokenizer=str(tmp_path / 'tokens')),
        optim=dict(lr=2e-3, warmup=50, clip=1.0, weight_decay=0.05),
        evals=dict(unseen=dict(
            type='zero_shot', source=data | {'split': 'test'}, labels=tuple(CAPTIONS),
            templates=('{}',), image_size=(32, 16), batch_size=72,
        )),
    ), [])  # fmt: skip
    with workdir.lock_workdir(str(tmp_path / 'run')) as path:
        metrics = train.train(full, path, Stop())['metrics']
    assert metrics['unseen/accuracy'] > 0.1, metrics  # chance: 0.01
