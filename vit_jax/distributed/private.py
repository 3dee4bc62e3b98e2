"""Private names of JAX for which there are no public ones; no other module imports any."""

import importlib
from typing import Any

import jax

from vit_jax.errors import UserError


def lookup(module: str, name: str) -> Any:
    """A name in a private module of JAX; raises UserError if the installed JAX lacks it."""
    try:
        return getattr(importlib.import_module(f'jax._src.{module}'), name)
    except (ImportError, AttributeError) as e:
        raise UserError(
            f'jax {jax.__version__} lacks jax._src.{module}.{name}, by which processes find each '
            'other; jax 0.9.0 to 0.11.2 have it: pip install "jax<=0.11.2"'
        ) from e


def on_tpu_vm() -> bool:
    """Whether this machine has TPUs that JAX can use."""
    return lookup('cloud_tpu_init', 'running_in_cloud_tpu_vm')


def detect_cluster(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    devices: list[int] | None,
    cluster: str,
    timeout: int,
) -> tuple[str, int, int, list[int] | None]:
    """Detects the arguments of jax.distributed.initialize that are None, as that does itself.

    Raises:
      KeyError: an environment variable is missing.
      OSError, RuntimeError: a server of metadata does not answer.
    """
    detect = lookup('clusters', 'ClusterEnv').auto_detect_unset_distributed_params
    return detect(coordinator, processes, process, devices, cluster, timeout)


def key_value_store() -> Any:
    """The client of the key-value store of jax.distributed, which is initialized."""
    return lookup('distributed', 'global_state').client
