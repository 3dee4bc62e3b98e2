"""What computes a run, its devices, driver and libraries, on which the last bits depend."""

import importlib.metadata
import pathlib
import re
import zlib

import jax

from vit_jax.data import pipeline

NVIDIA = r'nvidia-(cublas|cudnn|cuda-runtime|cuda-nvcc|nccl)\b'
LIBRARIES = re.compile(rf'(jax-(cuda|rocm)\d|{NVIDIA}|libtpu$)')


def facts() -> dict[str, str]:
    """{name: value} of this process's machine: devices, backend, driver, libraries, processor."""
    device = jax.devices()[0]
    found = {'devices': str(jax.device_count()), 'processes': str(jax.process_count())}
    if device.platform == 'cpu':
        # Which instructions there are, and in how many parts a sum is cut.
        return found | {'processor': processor(), 'cores': str(pipeline.cores())}
    found['backend'] = ' '.join(device.client.platform_version.split())
    driver = nvidia_driver()
    return found | libraries() | ({'driver': driver} if driver else {})


def libraries() -> dict[str, str]:
    """Versions of the installed packages that compute on accelerators."""
    names = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    return {name: names[name] for name in sorted(names) if LIBRARIES.match(name)}


def nvidia_driver() -> str | None:
    """Version of NVIDIA's kernel module; None without one."""
    try:
        text = pathlib.Path('/proc/driver/nvidia/version').read_text()
    except OSError:
        return None
    match = re.search(r'\b\d+\.\d+(\.\d+)?\b', text)
    return match and match[0]


def cpu_lines() -> list[str]:
    """Lines of /proc/cpuinfo that tell kinds of processors apart, once each."""
    try:
        text = pathlib.Path('/proc/cpuinfo').read_text()
    except OSError:
        return []
    return sorted({
        line for line in text.splitlines() if line.startswith(('flags', 'Features', 'model '))
    })  # fmt: skip


def cpu_id() -> str:
    """A short identifier of this machine's kind of processor."""
    lines = cpu_lines()
    return f'{zlib.crc32(" ".join(lines).encode()):08x}' if lines else 'any'


def processor() -> str:
    """Name and identifier of the processor."""
    name = next((line for line in cpu_lines() if line.startswith('model name')), '')
    return f'{name.partition(":")[2].strip() or "CPU"} ({cpu_id()})'
