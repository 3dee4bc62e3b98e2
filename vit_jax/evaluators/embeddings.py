"""Embeddings of texts by a run of two towers. Shapes: N texts, L tokens, E dimensions."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from vit_jax import evaluators, sharding
from vit_jax.data.tokenizers import Named, warn_of_another
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.evaluators import Subject


def tokenizer_of(subject: Subject, address: str | None) -> Named:
    """The tokenizer of a setting, for texts of the run's length, or the run's own.

    Raises UserError where there is neither.
    """
    own = subject.tokenizer
    if address is None and own is None:
        raise UserError('evals: the run has no tokenizer; name one: tokenizer=PATH')
    if address is None or own is None:
        return own or Named(address)
    found = Named(address, own.given if own.fits else own.length, own.fits)
    found.check()
    warn_of_another(own.address, found)
    return found


def check_outputs(subject: Subject, *names: str) -> None:
    """Raises UserError unless the objective predicts these outputs."""
    for name in names:
        if name not in subject.outputs:
            raise UserError(
                f'evals: the objective predicts no {name}, as objective contrastive does'
            )


def text_embedder(subject: Subject, batch_size: int) -> Callable:
    """Makes a function (params, ids [N, L], stop, set_phase) -> float32 [N, E].

    It returns None if `stop` becomes true. Texts are embedded `batch_size` at a time over all
    devices and processes, each of which has the result.
    """
    def embed(params, batch):
        return {'embedding': subject.predict(params, batch)['text_embedding']}

    step = evaluators.compiled(embed, subject.mesh)

    def embedded(
        params: Any, ids: np.ndarray, stop: Stop | None, set_phase: Callable[[str], None]
    ) -> np.ndarray | None:
        stop = Stop() if stop is None else stop
        feed = partial(batches, ids, subject.mesh, batch_size)
        found = [
            one['embedding'] for one in evaluators.results(
                step, feed, params, subject.mesh, stop, set_phase, lambda texts: None
            )
        ]  # fmt: skip
        return None if stop else np.concatenate(found)[: len(ids)]

    return embedded


def batches(
    ids: np.ndarray, mesh: jax.sharding.Mesh, batch_size: int, stop: Stop | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of batches of texts, the last one padded with the first text."""
    rows = sharding.rows(batch_size, mesh)
    for start in range(0, len(ids), batch_size):
        places = start + rows
        real = places < len(ids)
        places = np.where(real, places, 0)
        yield {
            'text': ids[places], 'mask': real.astype(np.float32), 'id': places.astype(np.int32),
        }  # fmt: skip
