"""TFDS builder of emoji of two houses with their names, from the npm packages emoji-datasource."""

import hashlib
import io
import json
import pathlib
import tarfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.errors import UserError

HOUSES = ('google', 'twitter')
PACKAGE, VERSION = 'emoji-datasource', '16.0.0'
CATEGORIES = ['Activities', 'Animals & Nature', 'Component', 'Flags', 'Food & Drink', 'Objects',
              'People & Body', 'Smileys & Emotion', 'Symbols', 'Travel & Places']
SIZE = 64
SEEN = 0.8  # share of the emoji whose names a run may train on
PACK = 'npm pack ' + ' '.join(f'{PACKAGE}-{house}@{VERSION}' for house in HOUSES)


class Builder(tfds.core.GeneratorBasedBuilder):
    """1,911 emoji, each drawn by two houses, on white, with captions and one of 10 categories.

    Splits are named by the house, google and twitter. HOUSE_seen has 80% of the emoji, the same of
    both houses, by a hash of what they are; HOUSE_unseen has the others. Captions are the name in
    lower case, and the short names.
    """

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'First.'}
    MANUAL_DOWNLOAD_INSTRUCTIONS = f'Run in the folder manual_dir: {PACK}'

    def _info(self):
        return self.dataset_info_from_configs(
            description='Emoji of two houses (Google: Apache-2.0; Twitter: CC-BY 4.0), as the npm '
            'packages emoji-datasource-google and -twitter have them (MIT licence).',
            homepage='https://github.com/iamcal/emoji-data',
            features=tfds.features.FeaturesDict({
                'image': tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format='png'),
                'label': tfds.features.ClassLabel(names=CATEGORIES),
                'captions': tfds.features.Sequence(tfds.features.Text()),
            }),
        )

    def _split_generators(self, dl_manager):
        try:
            folder = pathlib.Path(dl_manager.manual_dir)
        except AssertionError as e:  # there is no such folder
            raise UserError(f'emoji is made of packages that are not there: {e}') from e
        splits = {}
        for house in HOUSES:
            path = folder / f'{PACKAGE}-{house}-{VERSION}.tgz'
            if not path.exists():
                raise UserError(
                    f'emoji reads {path}, which is not there; run in its folder: {PACK}'
                )
            for part in ('', '_seen', '_unseen'):
                splits[house + part] = self._generate_examples(path, house, part)
        return splits

    def _generate_examples(self, path, house, part):
        with tarfile.open(path) as tar:
            rows = json.load(tar.extractfile('package/emoji.json'))
            for row in rows:
                if part and (part == '_seen') != is_seen(row['unified']):
                    continue
                member = tar.extractfile(f'package/img/{house}/{SIZE}/{row["image"]}')
                yield row['unified'], {
                    'image': on_white(member.read()), 'label': row['category'],
                    'captions': captions(row),
                }  # fmt: skip


def is_seen(code: str) -> bool:
    """Whether an emoji, by its code points, is in the splits HOUSE_seen."""
    digest = hashlib.sha256(code.encode()).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64 < SEEN


def captions(row: dict) -> list[str]:
    """The name and the short names, in lower case and each once."""
    names = [row['name'], *row['short_names']]
    texts = [' '.join(name.lower().replace('_', ' ').replace('-', ' ').split()) for name in names]
    return list(dict.fromkeys(texts))


def on_white(data: bytes) -> Image.Image:
    """A PNG with its transparent parts on white, SIZE x SIZE."""
    image = Image.open(io.BytesIO(data)).convert('RGBA').resize((SIZE, SIZE))
    white = Image.new('RGBA', image.size, 'white')
    return Image.fromarray(np.asarray(Image.alpha_composite(white, image).convert('RGB')))
