"""What is computed of the images of a training set once, and kept in place of them.

A method asks for it by `objectives.Objective.kept`. WORKDIR/kept.npz has it for the next start of a
run of one process; several processes compute it at each start. Shapes: N examples.
"""

import io
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vit_jax import config as configs
from vit_jax import evaluators, optim
from vit_jax.data import pipeline
from vit_jax.data.readers import facts
from vit_jax.data.sources import Source
from vit_jax.data.tasks import Task
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.progress import Bar
from vit_jax.models.parameters import named_leaves
from vit_jax.objectives import Objective
from vit_jax.run import fingerprints

FILE = 'kept.npz'
USABLE = 'usable'  # bool [N], beside the arrays: whether an image can be used


class Records:
    """Other records with further fields, of `arrays` {name: [N, ...]}.

    Raises UserError for an example of which `usable` [N] is false.
    """

    def __init__(self, records: Any, arrays: Mapping[str, np.ndarray], usable: np.ndarray) -> None:
        self.records, self.arrays, self.usable = records, arrays, usable
        self.max_labels = getattr(records, 'max_labels', None)
        self.label_fields = getattr(records, 'label_fields', ('label',))
        self.parts = getattr(records, 'parts', None)  # of a mixture, for the pipeline's order

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Any:
        if not self.usable[i]:
            raise UserError('its image cannot be used')
        return self.records[i] | {name: x[i] for name, x in self.arrays.items()}

    def traits(self) -> facts.Traits:
        """See `readers.facts`."""
        return facts.traits(self.records)

    def name(self, i: int) -> str:
        """Name of example i."""
        return self.records.name(i)


def without_image(task: Task, objective: Objective, tx: optim.Optimizer, params: Any) -> Task:
    """The task of examples that have what is kept in place of their image.

    Raises UserError if it would change during the run: the view draws at random, or a weight that
    it depends on is trained.
    """
    kept = objective.kept
    if task.rest is None:
        raise UserError(
            f"{kept.setting}: the images of data.task differ from step to step; set data.view to "
            "one that is not random, such as 'resize', and data.augment to ()"
        )
    trained = [
        name for name, *_, frozen in tx.table if not frozen and re.search(kept.weights, name)
    ]  # fmt: skip
    if trained:
        raise UserError(
            f'{kept.setting}: {trained[0]} is trained, and what is kept depends on it; freeze it: '
            f"optim.freeze='{kept.weights}'"
        )
    one = evaluators.one_example({'image': objective.inputs['image']})
    made = jax.eval_shape(kept.compute, params, one)
    blank = {name: x for name, x in task.blank.items() if name != 'image'}
    blank |= {name: np.zeros(x.shape[1:], x.dtype) for name, x in made.items()}
    return task._replace(blank=blank, read=partial(read, rest=task.rest, names=tuple(made)))


def read(
    record: Mapping[str, Any], rng: np.random.Generator, *, rest: Callable, names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Makes an example of a record that has the arrays `names` as fields."""
    return {name: record[name] for name in names} | rest(record, rng)


def filled(
    config: ConfigDict, parts: Any, params: Any, path: epath.Path, stop: Stop,
    set_phase: Callable[[str], None],
) -> Any | None:  # fmt: skip
    """The parts of a run whose examples have what is kept; None if `stop` becomes true.

    Args:
      config: the config of the run.
      parts: assembly.Parts.
      params: the parameters, of which those that matter do not change.
      path: workdir of the run.
      stop: ends the computation early.
      set_phase: called with the phases of the computation.
    """
    function = configs.named('data.task', config.data.task).function
    settings = configs.settings_of(config.data, function)
    matters = {name: x for name, x in named_leaves(params).items()
               if re.search(parts.objective.kept.weights, name)}  # fmt: skip
    key = facts.digest([
        json.dumps(fingerprints.contents(matters), sort_keys=True),
        json.dumps(facts.of(parts.source), sort_keys=True),
        json.dumps([config.model.to_dict(), ConfigDict(settings).to_dict()], sort_keys=True),
    ])  # fmt: skip
    arrays = None if stop.shared else stored(path / FILE, key, len(parts.source))
    if arrays is None:
        task = function(parts.source, **settings)
        arrays = computed(config, parts, task, params, stop, set_phase)
        if arrays is None:
            return None
        if not stop.shared:
            data = io.BytesIO()
            np.savez(data, key=np.array([key, *sorted(arrays)]), **arrays)
            storage.write(path / FILE, data.getvalue())
    usable, whole = arrays.pop(USABLE), parts.source
    records = Records(whole.records, arrays, usable)
    return parts._replace(source=Source(records, whole.classes, whole.labels, whole.stuff))


def stored(path: epath.Path, key: str, count: int) -> dict[str, np.ndarray] | None:
    """The arrays in a file, if they are those of the key, of `count` examples."""
    data = storage.read(path)
    if data is None:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = dict(file)
        first, *names = arrays.pop('key').tolist()
        if first != key:
            return None
        if names != sorted(arrays) or any(len(x) != count for x in arrays.values()):
            raise ValueError('arrays are missing')
    except Exception as e:  # NumPy and zipfile raise any for damaged data
        logging.warning('%s is damaged (%s); its contents are computed again', path, e)
        return None
    return arrays


def computed(
    config: ConfigDict, parts: Any, task: Task, params: Any, stop: Stop,
    set_phase: Callable[[str], None],
) -> dict[str, np.ndarray] | None:  # fmt: skip
    """{name: [N, ...]} of what is kept, and USABLE; None if `stop` becomes true."""

    def compute(params, batch):
        marks = {name: batch[name] for name in ('id', 'mask')}
        return parts.objective.kept.compute(params, {'image': batch['image']}) | marks

    reading = configs.settings_of(config.data, pipeline.examples)
    reading['workers'] = reading['workers'] or 0
    feed = partial(evaluators.reader(parts.mesh, **reading), parts.source, task)
    step, count = evaluators.compiled(compute, parts.mesh), len(parts.source)
    arrays = {USABLE: np.zeros(count, bool)}
    with Bar('features', count, stream='stdout', shown=jax.process_index() == 0) as bar:
        for part in evaluators.results(step, feed, params, parts.mesh, stop, set_phase, bar.add):
            there = part.pop('mask') > 0
            ids = part.pop('id')[there]
            arrays[USABLE][ids] = True
            for name, x in part.items():
                if name not in arrays:
                    arrays[name] = np.zeros((count, *x.shape[1:]), x.dtype)
                arrays[name][ids] = x[there]
    return None if stop else arrays
