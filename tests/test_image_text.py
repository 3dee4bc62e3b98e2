"""Images with captions: every layout, what is wrong in them, which caption a step draws, runs."""

import io
import json
import pathlib
import shutil
import tarfile

import kinds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import words

import vit_jax
from vit_jax import config, train
from vit_jax.data import __main__ as show
from vit_jax.data import captions, images, mixture, pipeline, sources
from vit_jax.data.prepare import folder as preparing
from vit_jax.data.readers import facts
from vit_jax.data.tasks import image_text, text
from vit_jax.data.tokenizers import Named
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.run import workdir

TINY = pathlib.Path(__file__).with_name('tiny_words.py')
CAPTIONS = [['a dog', 'the red dog'], ['A CAT'], ['bag', 'shoe bag', 'a coat']]


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    return str(words.clip(tmp_path_factory.mktemp('tokens')))


class Photos(tfds.core.GeneratorBasedBuilder):
    """The features of coco_captions."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(encoding_format='png'),
            'captions': tfds.features.Sequence({'id': np.int64, 'text': tfds.features.Text()}),
        }))  # fmt: skip

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i, own in enumerate(CAPTIONS):
            yield i, {'image': io.BytesIO(kinds.png(i)), 'captions': [
                {'id': k, 'text': one} for k, one in enumerate(own)
            ]}  # fmt: skip


def write_jsonl(path, rows, name='captions.jsonl'):
    path.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        (path / f'{i}.png').write_bytes(kinds.png(i))
        rows[i] = row if isinstance(row, bytes) else json.dumps({'file_name': f'{i}.png'} | row)
    lines = [row if isinstance(row, bytes) else row.encode() for row in rows]
    (path / name).write_bytes(b'\n'.join([*lines, b'']))
    return dict(name=str(path))


def folder_of(path, few):
    return write_jsonl(path, [{'captions': own} for own in few])


def metadata_of(path, few):
    write_jsonl(path / 'train', [{'text': own[0] if len(own) == 1 else own} for own in few],
                'metadata.jsonl')  # fmt: skip
    return dict(name=str(path))


def tar_of(path, few, member='json', content=lambda own: json.dumps({'all': own}).encode()):
    path.mkdir(parents=True)
    with tarfile.open(path / '0.tar', 'w') as tar:
        for i, own in enumerate(few):
            for suffix, data in (('png', kinds.png(i)), (member, content(own))):
                info = tarfile.TarInfo(f'{i:03}.{suffix}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return dict(name=str(path), label=None)


def parquet_of(path, few):
    path.mkdir(parents=True)
    rows = {'image': [{'bytes': kinds.png(i)} for i in range(len(few))], 'captions': few}
    pq.write_table(pa.table(rows), path / 'train-0.parquet')
    return dict(name=str(path), label=None)


def prepared_of(path, few):
    source = folder_of(path / 'from', few)
    preparing.prepare(
        source['name'], str(path / 'to'), splits=['train'], fields={}, max_side=0, quality=90,
        keep=['captions'], workers=1, shard_examples=9, shards=None, against=[], distance=-1,
        tolerance=0.0,
    )  # fmt: skip
    return dict(name=str(path / 'to'))


LAYOUTS = {
    'folder': folder_of, 'metadata': metadata_of, 'tar': tar_of, 'parquet': parquet_of,
    'prepared': prepared_of,
}  # fmt: skip


def task_of(source, tokens, **settings):
    fixed = dict(view='resize', image_size=4, tokenizer=tokens, length=6)
    return image_text.image_text(source, **fixed | settings)


def evaluated(source, tokens, most=4, **settings):
    task = image_text.all_captions(
        source, view='resize', image_size=4, tokenizer=Named(tokens, 6), most=most, **settings
    )
    (batch,) = pipeline.examples(source, task, batch_size=len(source), threads=1)
    return batch


def check_all(source, tokens, few=CAPTIONS, **settings):
    """Every image has its captions, in their order; the rest is padding."""
    batch, tokenizer = evaluated(source, tokens, **settings), vit_jax.tokenizer(tokens, length=6)
    assert batch['mask'].all() and batch['text'].dtype == np.int32
    assert batch['captions'].tolist() == [len(own) for own in few]
    assert batch['image'][:, 0, 0, 0].tolist() == list(range(len(few)))
    for row, own in zip(batch['text'], few, strict=True):
        assert row[: len(own)].tolist() == tokenizer(own).tolist()
        assert (row[len(own) :] == tokenizer.pad).all()


@pytest.mark.parametrize('layout', LAYOUTS)
def test_captions_of_every_layout(layout, tmp_path, tokens):
    source = sources.load(**LAYOUTS[layout](tmp_path / 'a', CAPTIONS))
    field = {'tar': 'json/all'}.get(layout)
    assert source.classes == ()
    check_all(source, tokens, text=field)
    drawn = next(pipeline.batches(source, task_of(source, tokens, text=field), 0, batch_size=8))
    assert drawn['mask'].all() and drawn.keys() == {'image', 'text', 'mask', 'id'}


def test_captions_of_tfds_and_of_text_beside_images(tmp_path, tokens, monkeypatch):
    builder = Photos(data_dir=tmp_path)
    builder.download_and_prepare(file_format='array_record')
    source = sources.load(name='photos', data_dir=str(tmp_path), label=None)
    check_all(source, tokens)
    with pytest.raises(UserError, match='no feature .label.* source.label=None reads no labels'):
        sources.load(name='photos', data_dir=str(tmp_path))
    few = [['a dog'], ['A CAT']]
    settings = tar_of(tmp_path / 'txt', few, 'txt', lambda own: own[0].encode() + b'\n')
    check_all(sources.load(**settings), tokens, few)


@pytest.mark.parametrize('row, error', [
    ({'text': ' \n'}, 'its caption is empty'), ({'text': 3}, 'its caption is 3, not text'),
    ({'captions': ['a', '']}, 'its caption 1 of 2 is empty'),
    ({'captions': []}, 'its captions are none'), ({'caption': None}, 'is None, not text'),
    ({'title': 'a'}, 'none of the fields captions, .* among .*title.*; data.text names its field'),
    ({'text': '\ud83d'}, 'its caption is not Unicode: character 0'),
    (b'{"file_name": "1.png", "text": "caf\xe9"}', 'its caption is not Unicode'),
    (b'{"file_name": "gone.png", "text": "a"}', 'cannot read .*gone.png: No such file'),
    (b'{"text": "a dog"}', "no field 'image'"),
])  # fmt: skip
def test_an_unusable_example_is_named_and_counted(row, error, tmp_path, tokens):
    rows = [{'text': 'a dog'}, row, {'text': 'a cat'}]
    source = sources.load(**write_jsonl(tmp_path, rows))
    task = task_of(source, tokens)
    with pytest.raises(UserError, match=rf'(1|gone)(\.png)?: .*{error}.*1 of 3 examples'):
        list(pipeline.examples(source, task, batch_size=3, threads=1))
    (batch,) = pipeline.examples(source, task, batch_size=3, threads=1, tolerance=0.4)
    assert batch['mask'].tolist() == [1, 0, 1]


def test_a_plan_needs_no_tokenizer_but_the_length(tmp_path):
    source = sources.load(**folder_of(tmp_path / 'a', CAPTIONS))
    task = task_of(source, str(tmp_path / 'none'))
    assert task.blank['text'].shape == (6,)
    for read in (lambda: task.read(source.records[0], np.random.default_rng(0)),
                 lambda: task_of(source, str(tmp_path / 'none'), length=None)):  # fmt: skip
        with pytest.raises(UserError, match='no tokenizer at'):
            read()


def test_fields_of_captions_and_bytes_that_are_not_utf8():
    with pytest.raises(images.Unreadable, match='its caption is not UTF-8: byte 3'):
        captions.of_record({'txt': b'caf\xe9'})
    assert captions.of_record({'txt': 'café\r\n'.encode()}) == ['café']
    assert captions.of_record({'a': {'b': ('x', b'y')}}, 'a/b') == ['x', 'y']
    assert captions.of_record({'image': b'', 'json': b'{"caption": "x"}'}) == ['x']
    with pytest.raises(images.Unreadable, match='it has no caption'):
        captions.of_record({'json': b'{"caption'})


@pytest.mark.parametrize('line, error', [
    (b'{"file_name": ', 'line 2 of .*captions.jsonl is no JSON'), (b'[1]', 'not an object'),
    (b'{"file_name": "../x.png"}', 'not a path below its folder'), (b'[' * 9999, 'line 2'),
])  # fmt: skip
def test_a_broken_list_is_refused_with_its_line(line, error, tmp_path):
    with pytest.raises(UserError, match=error) as caught:
        sources.load(**write_jsonl(tmp_path, [{'text': 'a dog'}, line]))
    assert '\n' not in str(caught.value)


def test_splits_shares_and_metadata_of_classes(tmp_path):
    for part in ('train', 'test'):
        write_jsonl(tmp_path / 'a' / part, [{'text': part, 'k': i} for i in range(4)])
    assert set(sources.splits_of(str(tmp_path / 'a'))) == {'train', 'test'}
    share = sources.load(name=str(tmp_path / 'a'), split='test[50%:]')
    assert len(share) == 2 and share.records[0]['text'] == 'test' and share.records[0]['k'] == 2
    with pytest.raises(UserError, match='val'):
        sources.load(name=str(tmp_path / 'a'), split='val')
    for name in ('ant', 'bee'):
        (tmp_path / 'b' / name).mkdir(parents=True)
        (tmp_path / 'b' / name / '0.png').write_bytes(kinds.png(3))
    (tmp_path / 'b' / 'metadata.jsonl').write_text('{"file_name": "ant/0.png", "size": 3}\n')
    assert sources.load(name=str(tmp_path / 'b')).classes == ('ant', 'bee')


def drawn(source, task, seed=3, steps=3, start=0, **settings):
    feed = pipeline.batches(source, task, seed, start, batch_size=8, threads=1, **settings)
    return [next(feed) for _ in range(steps)]


def test_a_step_draws_the_same_captions_on_any_number_of_hosts(tmp_path, tokens):
    source = sources.load(**folder_of(tmp_path, CAPTIONS))
    task = task_of(source, tokens)
    whole = drawn(source, task)
    halves = [drawn(source, task, rows=np.arange(8)[k::2]) for k in range(2)]
    for step, batch in enumerate(whole):
        for k in range(2):
            assert batch['text'][k::2].tolist() == halves[k][step]['text'].tolist()
    assert drawn(source, task, steps=1, start=2)[0]['text'].tolist() == whole[2]['text'].tolist()
    tokenizer = vit_jax.tokenizer(tokens, length=6)
    known = [{tuple(row) for row in tokenizer(own).tolist()} for own in CAPTIONS]
    seen = [set() for _ in CAPTIONS]
    for batch in drawn(source, task, steps=12):
        for i, row in zip(batch['id'], batch['text'].tolist(), strict=True):
            seen[i].add(tuple(row))
    assert seen == known  # each caption is drawn, and no other


def test_text_alone_with_and_without_classes(tmp_path, tokens):
    rows = [{'text': 'a dog', 'label': 'pet'}, {'text': 'a coat', 'label': 'article'}]
    (tmp_path / 'captions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    source = sources.load(name=str(tmp_path))
    assert source.classes == ('article', 'pet')
    task = text.text(source, tokenizer=tokens, length=6, labels=True)
    (batch,) = pipeline.examples(source, task, batch_size=2, threads=1)
    assert batch['label'].tolist() == [1, 0] and task.names == {'classes': ('article', 'pet')}
    assert batch['text'].tolist() == task.tokenizer(['a dog', 'a coat']).tolist()
    bare = sources.load(name=str(tmp_path), label=None)
    (batch,) = pipeline.examples(bare, text.text(bare, tokenizer=tokens), batch_size=2, threads=1)
    assert batch['text'].shape == (2, 16) and 'label' not in batch
    with pytest.raises(UserError, match='has no labels; data.labels=False'):
        text.text(bare, tokenizer=tokens, labels=True)


def test_texts_of_parquet_and_tfds_need_no_images(tmp_path, tokens):
    (tmp_path / 'texts').mkdir()
    rows = {'text': ['a dog', 'bag', 'a cat'], 'label': [1, 0, 1]}
    pq.write_table(pa.table(rows), tmp_path / 'texts' / 'train-0.parquet')
    source = sources.load(name=str(tmp_path / 'texts'), image=None)
    task = text.text(source, tokenizer=tokens, length=6, labels=True)
    (batch,) = pipeline.examples(source, task, batch_size=3, threads=1)
    assert batch['label'].tolist() == [1, 0, 1] and batch['mask'].all()
    assert batch['text'].tolist() == task.tokenizer(rows['text']).tolist()
    Photos(data_dir=tmp_path).download_and_prepare(file_format='array_record')
    bare = sources.load(name='photos', data_dir=str(tmp_path), image=None, label=None)
    (batch,) = pipeline.examples(bare, text.text(bare, tokenizer=tokens), batch_size=3, threads=1)
    assert batch['mask'].all() and facts.of(bare)['examples'] == 3
    shards = tar_of(tmp_path / 'tar', CAPTIONS)
    with pytest.raises(UserError, match='examples of tar shards need an image'):
        sources.load(**shards, image=None)


@pytest.mark.parametrize('layout', ['tar', 'parquet'])
def test_captions_without_labels_are_mixed(layout, tmp_path, tokens):
    parts = {
        name: LAYOUTS[layout](tmp_path / name, few) | {'weight': 1.0}
        for name, few in (('a', CAPTIONS), ('b', [['a dog']]))
    }
    source = mixture.load(mixture=parts)
    task = task_of(source, tokens, text={'tar': 'json/all'}.get(layout))
    batch = next(pipeline.batches(source, task, 0, batch_size=8))
    assert batch['mask'].all() and set(batch['id']) <= {0, 1, 2, 3}


def test_captions_are_prepared_at_any_size_and_masks_are_not(tmp_path, tokens):
    source = folder_of(tmp_path / 'a', CAPTIONS)
    preparing.prepare(source['name'], str(tmp_path / 'b'), keep=('captions',), max_side=2)
    batch = evaluated(sources.load(name=str(tmp_path / 'b')), tokens)
    assert batch['captions'].tolist() == [2, 1, 3]
    with pytest.raises(UserError, match='captions do not, but mask is none'):
        preparing.prepare(source['name'], str(tmp_path / 'c'), keep=('mask',), max_side=2)


def test_the_batch_of_a_step_is_shown_with_its_captions(tmp_path, tokens):
    settings = folder_of(tmp_path / 'data', CAPTIONS)
    full = config.load(f'{TINY}:{tmp_path / "data"},{tokens}')
    source = sources.load(**settings)
    task = task_of(source, tokens)
    pictures, rows = show.captioned(full, source, task, 2, 5)
    batch = drawn(source, task, seed=2, steps=1, start=2)[0]
    assert [row['id'] for row in rows] == batch['id'][:5].tolist()
    known = [{caption.lower() for caption in own} for own in CAPTIONS]
    for k, row in enumerate(rows):
        (shown,) = row['labels']
        assert shown in known[row['id']] and row['used']
        assert task.tokenizer(shown)[0].tolist() == batch['text'][k].tolist()
        assert (pictures[k].image == batch['image'][k]).all()
    show.draw(tmp_path / 'a.png', 'png', pictures, rows, 'captions')
    assert (tmp_path / 'a.png').stat().st_size > 1000


def run(path, folder, tokens, stop):
    with workdir.lock_workdir(str(path)) as path:
        return train.train(config.load(f'{TINY}:{folder},{tokens}'), path, stop)


class StopSoon(Stop):
    """True from its sixth question on."""

    asked = 0

    def __bool__(self):
        self.asked += 1
        return self.asked > 5


def test_a_run_keeps_its_tokenizer_and_refuses_another(tmp_path):
    words.clip(tmp_path / 'tokens')
    folder_of(tmp_path / 'data', CAPTIONS * 3)
    places = tmp_path / 'run', tmp_path / 'data', tmp_path / 'tokens'
    assert run(*places, StopSoon()) is None
    kept, whole = (vit_jax.tokenizer(tmp_path / name) for name in ('run', 'tokens'))
    assert kept(words.STRANGE).tolist() == whole.with_length(6)(words.STRANGE).tolist()
    words.clip(tmp_path / 'tokens', pad_token='!')
    with pytest.raises(UserError, match='data.tokenizer'):
        run(*places, Stop())
    assert vit_jax.tokenizer(tmp_path / 'run').fingerprint == kept.fingerprint
    shutil.rmtree(tmp_path / 'tokens')  # the run has its copy
    assert run(*places, Stop())['steps'] == 12
    with pytest.raises(UserError, match='no tokenizer at'):
        run(tmp_path / 'other', *places[1:], Stop())
