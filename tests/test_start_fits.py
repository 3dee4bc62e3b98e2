"""What a dry run says of the checkpoint that a run is to begin from, without its values."""

import re

import jax
import pytest
import tiny_towers
import words
from PIL import Image

import vit_jax
from vit_jax import assembly, config, models
from vit_jax.assembly import differences, initial
from vit_jax.errors import UserError
from vit_jax.plan import rehearsal

SMALL = tiny_towers.SMALL


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with images and captions, a tokenizer, and two towers of big_vision's format."""
    folder = tmp_path_factory.mktemp('place')
    words.clip(folder / 'tokens', length=12)
    (folder / 'data').mkdir()
    for i in range(8):
        Image.new('RGB', (8, 8)).save(folder / 'data' / f'{i}.png')
    rows = [f'{{"file_name": "{i}.png", "text": "a dog"}}' for i in range(8)]
    (folder / 'data' / 'captions.jsonl').write_text('\n'.join(rows))
    tiny_towers.save(folder / 'towers.npz', vit_jax.tokenizer(folder / 'tokens').vocab_size)
    return folder


def settings(place, *changes):
    given = tiny_towers.get_config(str(place)).to_dict() | dict(evals={})
    given['model'] = dict(name='vit/4', num_classes=8, pool='gap', **SMALL)
    given['objective'] = dict(name='contrastive', text=dict(**SMALL))
    start = ('init_from', f'{place}/towers.npz')
    return config.override(given, [start, *changes])


def test_shapes_are_those_of_the_values(place, monkeypatch):
    from vit_jax.convert import load as weights

    for options in (dict(towers=True), dict(part='encoder', image_size=16, num_classes=3)):
        path = place / 'towers.npz'
        whole, shapes = (weights.read(path, values=v, **options) for v in (True, 'shapes'))
        found = jax.tree.map(lambda x: (x.shape, x.dtype), shapes.params)
        assert found == jax.tree.map(lambda x: (x.shape, x.dtype), whole.params)
        assert shapes.account == whole.account


def made(full):
    return assembly.make(full, devices=jax.devices()[:1])


def test_a_dry_run_checks_the_checkpoint_and_reads_no_values(place, monkeypatch):
    monkeypatch.setattr('vit_jax.convert.files.Array.read', None)
    text = rehearsal.describe(settings(place), 'runs/x')
    assert f'starts   from {place}/towers.npz' in text.splitlines()
    assert f'data     {place}/data: 8 images' in text.splitlines()
    full = settings(
        place, ('model.width', '32'), ('model.pre_norm', 'true'), ('model.num_classes', '9'),
        ('objective.text.depth', '2'),
    )  # fmt: skip
    words_ = (
        'model.num_classes is 9, there 8; model.width is 32, there 16; model.pre_norm is True, '
        'there False; objective.text.num_classes is 9, there 8; objective.text.depth is 2, there 1'
    )
    message = f'{place}/towers.npz, whose weights do not fit this model: {words_}'
    with pytest.raises(UserError, match=f'{re.escape(message)}$'):
        rehearsal.describe(full, 'runs/x')


def test_a_damaged_checkpoint_is_named_and_an_absent_one_noted(place, tmp_path, caplog):
    full = settings(place, ('model.gelu', 'exact'), ('objective.text.pad_id', '3'))
    parts = made(full)
    initial.check(full, parts)
    [line] = [r.getMessage() for r in caplog.records if 'computes otherwise' in r.getMessage()]
    assert line.endswith("model of images computes otherwise: model.gelu is 'exact', there 'tanh'")

    (tmp_path / 'cut.npz').write_bytes((place / 'towers.npz').read_bytes()[:2000])
    full.init_from = f'{tmp_path}/cut.npz'
    assert initial.is_here(full.init_from)
    with pytest.raises(UserError, match=r'cut\.npz'):
        initial.check(full, parts)
    for path, note in (
        (f'{tmp_path}/absent', 'not checked, as there is no such file or folder here'),
        ('hf://nobody/nothing', 'not read, as it is to be downloaded'),
    ):
        full.init_from = path
        assert rehearsal.start_text(full, initial.is_here(path)) == f'{path} ({note})'


def test_a_field_of_a_group_is_named_by_its_path():
    plain = models.build('vit/4', **SMALL)
    other = models.build('vit/4', style=dict(norm='rms'), pool='gap', **SMALL)
    found = differences.of_structure(plain, other, 'model')
    assert found == "model.pool is 'gap', there 'cls'; model.style.norm is 'rms', there 'layer'"
    mixer = models.build('mixer-s/4')
    assert 'is a Mixer' in differences.of_structure(mixer, plain, 'model')
