"""XLA's flags for tests: CPU programs that run once and briefly compile in a third of the time."""

import jaxlib

TPU_TOO = '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
# The TPU's compiler ends a process that has this flag, and so does jaxlib from 0.11 on.
OLD = jaxlib.version.__version_info__ < (0, 11)
CPU_ALONE = '--xla_cpu_use_fusion_emitters=false' if OLD else ''


def devices(count: int, *, cpu_alone: bool = True) -> str:
    """Flags for so many simulated CPU devices; without `cpu_alone` those that libtpu knows, too."""
    flags = f'--xla_force_host_platform_device_count={count} {TPU_TOO}'
    return f'{flags} {CPU_ALONE}'.strip() if cpu_alone else flags
