"""XLA's flags for tests: CPU programs that run once and briefly compile in a third of the time."""

FAST_COMPILATION = (
    '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
    '--xla_cpu_parallel_codegen_split_count=1'
)


def devices(count: int) -> str:
    """Flags for so many simulated CPU devices."""
    return f'--xla_force_host_platform_device_count={count} {FAST_COMPILATION}'
