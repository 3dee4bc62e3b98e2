"""What the runs of a recipe cost, and what they need that can't simply be downloaded.

Costs follow from the models' FLOPs: three forward passes for each image of the training, at a share
of the peak of a slice's chips. Nothing is compiled; docs/planning.md compares such costs with those
of compiled plans. Evaluations are not counted.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from vit_jax import assembly
from vit_jax.convert import load
from vit_jax.data.readers import vtab
from vit_jax.distributed import devices, topologies
from vit_jax.errors import UserError
from vit_jax.plan import data_sets, rehearsal

NOT_PUBLIC, BY_HAND = 'not public', 'manual download'
# Sources: arXiv:2010.11929 section 4.1 and arXiv:2106.04560 section 3.1 (JFT); for manual downloads
# tensorflow.org/datasets/catalog; image-net.org (ImageNet-21k) and objectnet.dev are not in it;
# of images with texts the papers of their recipes.
ACCESS = {
    'jft_300m': NOT_PUBLIC, 'jft_3b': NOT_PUBLIC,
    'jft_like': f'drawn images in place of JFT, which is {NOT_PUBLIC}',
    'imagenet2012': BY_HAND, 'imagenet2012_real': BY_HAND, 'imagenet21k': BY_HAND,
    'objectnet': BY_HAND, 'resisc45': BY_HAND, 'diabetic_retinopathy_detection': BY_HAND,
    'webli': NOT_PUBLIC, 'wit400m': NOT_PUBLIC, 'lit4b': NOT_PUBLIC,
    'cc12m': 'a list of addresses', 'yfcc15m': 'to be asked for',
}  # fmt: skip


class Slice(NamedTuple):
    """TPU chips to state costs for."""

    name: str  # v4:4x4x8
    chips: int
    flops: float  # peak of a chip, FLOP/s

    def hours(self, flops: float, efficiency: float) -> float:
        """Hours that so many FLOPs take on the whole slice at a share of its peak."""
        return flops / (self.chips * self.flops * efficiency) / 3600


def slice_of(name: str) -> Slice:
    """The Slice of a name such as v4:4x4x8; raises UserError if there is none of that name."""
    kind, _, shape = name.partition(':')
    kind = topologies.ALIASES.get(kind, kind)
    if kind not in devices.CHIPS:
        raise UserError(f'no slice {name!r}; there are {", ".join(devices.CHIPS)}, as in v4:4x4x8')
    shape = topologies.slice_shape(kind, shape, None)
    chips = math.prod(map(int, shape.split('x')))
    return Slice(f'{kind}:{shape}', chips, devices.CHIPS[kind].tflops * 1e12)


def training_flops(config: ConfigDict) -> float | None:
    """FLOPs of the training of a run; None if its model or the size of its data is unknown."""
    if rehearsal.is_model_unknown(config):
        return None
    examples, classes = data_sets.published_size(config.data.source)
    if classes is None or examples is None and config.steps is None:
        try:
            source = data_sets.load(config.data.source)[0]
        except UserError:
            return None
    else:
        source = data_sets.stand_in(examples or config.data.batch_size, classes)
    task = assembly.task_of(config, source)
    model = assembly.model_of(config, task)
    spec = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in task.blank.items()}
    steps = assembly.steps_of(config, source)
    forward = assembly.objective_of(config, model, task, spec, steps, 'known').flops
    images = steps * config.data.batch_size
    return None if forward is None else 3 * forward * images


def needs(configs: Iterable[ConfigDict]) -> list[str]:
    """What runs need that can't simply be downloaded: ['jft_300m (not public)', ...], sorted."""
    found = set()
    for config in configs:
        for name in data_sets_of(config):
            kind = name.partition(':')[0]
            name = vtab.task(name).dataset if kind == 'vtab' else kind
            name = name.removeprefix('data/').partition('/')[0]
            if name in ACCESS:
                found.add(f'{name} ({ACCESS[name]})')
        begin = config.init_from
        if begin and not re.match('runs/|.*://', begin) and begin not in load.catalogue():
            found.add(f'{begin} (checkpoint, {NOT_PUBLIC})')
    return sorted(found)


def data_sets_of(config: ConfigDict) -> Iterator[str]:
    """Names of the data sets that a run trains on and is evaluated on."""
    for section in (config.data, *config.evals.values()):
        for key, settings in section.items():
            if key == 'source' or key.endswith('_source'):
                parts = settings.get('mixture')
                for one in parts.values() if parts else (settings,):
                    yield one['name']


def hours_text(hours: float) -> str:
    """Formats hours to three digits, with thousands separated."""
    return f'{hours:,.0f}' if hours >= 100 else f'{hours:.3g}'
