"""Retries of TensorStore's requests to object stores, for which Orbax has no setting.

This module alone uses private names of Orbax.
"""

import importlib.metadata

from vit_jax.errors import UserError

CONTEXTS = ('_BASE_TS_CONTEXT', '_DEFAULT_OCDBT_TS_CONTEXT')  # in 0.11.0 to 0.12.8


def limit_retries(retries: int) -> None:
    """Limits how often a request is retried, with pauses of 1 to 16 s; the default takes 15 min.

    Raises UserError if the installed Orbax lacks the names.
    """
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils  # takes seconds

        contexts = [getattr(tensorstore_utils, name) for name in CONTEXTS]
    except (ImportError, AttributeError) as e:
        version = importlib.metadata.version('orbax-checkpoint')
        raise UserError(
            f'gs:// needs names of Orbax that orbax-checkpoint 0.11.14 to 0.12.8 have, and '
            f'{version} does not ({e}); pip install "orbax-checkpoint<=0.12.8"'
        ) from e
    for context in contexts:
        context['gcs_request_retries'] = {
            'max_retries': retries, 'initial_delay': '1s', 'max_delay': '16s',
        }  # fmt: skip
