"""How many tokens and rows of a position table the fields of a model give, without the model."""

import jax
import jax.numpy as jnp
import pytest
from recorded import DATA, FIXTURES, location

from vit_jax import models
from vit_jax.convert import infer, load
from vit_jax.models import mixer, vit
from vit_jax.models.prefix import prefix_counts, prefix_rows

PREFIXES = [  # fields that decide which tokens are before the patches, and which have positions
    dict(pool='cls'),
    dict(pool='cls', cls_posemb=False, registers=3),
    dict(pool='cls', registers=3, registers_posemb=True, dist_token=True),
    dict(pool='cls', dist_token=True, cls_posemb=False, registers_posemb=True),
    dict(pool='gap', registers=2, registers_posemb=True),
    dict(pool='gap', cls_token=True),
    dict(pool='map', cls_token=False),
]
POSITIONS = [  # posemb, posemb_at
    ('learn', 'stem'), ('learn', 'shared'), ('none', 'stem'), ('sincos2d', 'stem'),
    ('sincos2d_moco', 'stem'),
]  # fmt: skip


def built(model, grid):
    """(rows of the position table or None, tokens of a block) of a model that is initialised."""
    size = [n * s for n, s in zip(grid, model.stride, strict=True)]
    images = jax.ShapeDtypeStruct((1, *size, len(model.mean)), jnp.float32)

    def apply(key, images):
        variables = model.init(key, images)
        _, out = model.apply(variables, images, capture='tokens_by_block')
        return variables['params'], out['tokens_by_block']

    params, tokens = jax.eval_shape(apply, jax.random.key(0), images)
    return params['posemb'].shape[1] if 'posemb' in params else None, tokens.shape[2]


def computed(fields, grid):
    """The same from the fields alone."""
    tokens = prefix_counts(*(fields[k] for k in ('pool', 'cls_token', 'dist_token', 'registers')))
    names = ('posemb', 'posemb_at', 'cls_posemb', 'registers_posemb')
    rows = prefix_rows(tokens, *(fields[k] for k in names))
    patches = grid[0] * grid[1]
    table = patches + sum(rows.values()) if fields['posemb'] == 'learn' else None
    return table, patches + sum(tokens.values())


@pytest.mark.parametrize('size', vit.SIZES)
def test_sizes(size):
    model = models.build(f'vit-{size}/16', registers=2, registers_posemb=True)
    assert computed(models.describe(model), (2, 3)) == built(model, (2, 3)) == (9, 9)


@pytest.mark.parametrize('posemb, posemb_at', POSITIONS)
def test_prefixes(posemb, posemb_at):
    shapes = set()
    for prefix in PREFIXES if posemb_at == 'stem' and posemb == 'learn' else PREFIXES[1:3]:
        model = models.build('vit-mu/16', posemb=posemb, posemb_at=posemb_at, **prefix)
        shapes.add(built(model, (1, 2)))
        assert computed(models.describe(model), (1, 2)) == built(model, (1, 2)), prefix
    assert len(shapes) > 1


@pytest.mark.parametrize('name', FIXTURES)
def test_files(name):
    with load.open_checkpoint(location(name)) as parsed:
        model, grid = infer.infer_model(parsed, {}, None)
    if isinstance(model, vit.Vit):
        rows, tokens = computed(models.describe(model), grid or (2, 2))
        assert (rows, tokens) == built(model, grid or (2, 2))
        assert rows == (parsed.table and parsed.table[1])
    elif isinstance(model, mixer.Mixer):
        assert infer.mixer_tokens(parsed) == grid[0] * grid[1]
    else:
        assert grid is None


def test_one_model_is_built_whatever_the_table_may_have(monkeypatch):
    names, build = [], models.build

    def counting(name, *args, **kwargs):
        names.append(name)
        return build(name, *args, **kwargs)

    monkeypatch.setattr(models, 'build', counting)
    with load.open_checkpoint(DATA / 'big_vision_tok_learn.npz') as parsed:
        model, _ = infer.infer_model(parsed, {}, None)
    assert len(names) == 1 and not model.cls_posemb
