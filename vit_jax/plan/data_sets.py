"""Data sets to plan with: the one that a config names, or a stand-in of its size."""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_jax.data import mixture, sources
from vit_jax.data.readers import splits, vtab
from vit_jax.errors import UserError

# Examples of the training split and classes, for plans without the data. Sources: arXiv:2010.11929
# section 4.1 (ImageNet, JFT-300M), arXiv:2106.04560 section 3.1 (JFT-3B; its "nearly 3 billion" in
# round numbers), tensorflow.org/datasets/catalog (the others); of the folders of ADE20K and of COCO
# 2017 by the names of their archives. Images with texts have no classes: tensorflow.org (COCO),
# arXiv:2103.00020 section 2.2 (WIT), arXiv:2209.06794 (WebLI, of all languages), arXiv:2111.07991
# section 4 (CC12M, YFCC100M's subset of CLIP, its own).
SIZES = {
    'imagenet2012': (1_281_167, 1000), 'imagenet21k': (14_197_122, 21_843),
    'jft_300m': (303_000_000, 18_291), 'jft_3b': (3_000_000_000, 29_593),
    'cifar10': (50_000, 10), 'cifar100': (50_000, 100), 'oxford_iiit_pet': (3_680, 37),
    'oxford_flowers102': (1_020, 102), 'places365_small': (1_803_460, 365),
    'scene_parse150': (20_210, 150), 'ADEChallengeData2016': (20_210, 150), 'coco': (118_287, 80),
    'coco/panoptic': (118_287, 133), 'coco_captions': (82_783, 0), 'wit400m': (400_000_000, 0),
    'webli': (10_000_000_000, 0), 'cc12m': (10_000_000, 0), 'yfcc15m': (15_000_000, 0),
    'lit4b': (4_000_000_000, 0),
}  # fmt: skip
VTAB_1K = {'train800': 800, 'val200': 200, 'train800val200': 1000}  # examples per split


class Placeholder(NamedTuple):
    """Records of a data set of which only the size is known."""

    length: int
    max_labels: int = 1

    def __len__(self) -> int:
        return self.length


def load(
    settings: Mapping | ConfigDict, examples: int | None = None, classes: int | None = None
) -> tuple[sources.Source, str | None]:
    """(the data set of a config's section `data.source`, or a stand-in; a note on the stand-in).

    `examples` and `classes` override the size. Raises UserError if it is unknown.
    """
    if examples is None and classes is None:
        try:
            return mixture.load(**settings), None
        except (UserError, OSError) as e:
            reason = str(e).partition('; ')[0].partition(' Did you')[0]
    else:
        reason = 'its size is given'
    name = mixture.title(settings)
    published = published_size(settings)
    examples, classes = examples or published[0], classes or published[1]
    if classes is None and without_labels(settings):
        classes = 0
    if not examples or classes is None:
        raise UserError(
            f'{reason}; state its size with --examples and --classes, or use one of '
            + ', '.join(SIZES)
        )
    note = f'{name}: {reason}; assumed to have {examples:,} examples and {classes:,} classes'
    return stand_in(examples, classes), note


def published_size(settings: Mapping | ConfigDict) -> tuple[int | None, int | None]:
    """(examples, classes) of a config's section `data.source` as published; None: unknown."""
    if 'mixture' in settings:
        sizes = [published_size(part)[0] for part in settings['mixture'].values()]
        return (sum(sizes) if all(sizes) else None), None
    name, split = mixture.title(settings), settings.get('split', 'train')
    if name.startswith('vtab:'):
        task = vtab.task(name)
        return {**VTAB_1K, 'train': task.train}.get(split), task.classes
    first, last = name.partition('/')[0].partition(':')[0], name.rstrip('/').rpartition('/')[2]
    if split.startswith('panoptic_'):
        last, split = f'{last}/panoptic', split.removeprefix('panoptic_')
    examples, classes = SIZES.get(first) or SIZES.get(last) or (None, None)
    part, length = splits.size(split, examples or 0)
    return length if examples and part in ('train', 'full') else None, classes


def without_labels(settings: Mapping | ConfigDict) -> bool:
    """Whether the section `data.source`, or all parts of its mixture, leave labels out."""
    parts = settings['mixture'].values() if 'mixture' in settings else [settings]
    return all(part.get('label', 'label') is None for part in parts)


def stand_in(examples: int, classes: int) -> sources.Source:
    """A data set of that size without any data."""
    return sources.Source(Placeholder(examples), tuple(map(str, range(classes))))
