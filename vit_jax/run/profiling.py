"""Traces device and host during some steps (--profile STEP:COUNT), for XProf and Perfetto."""

import contextlib
import importlib.metadata
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from vit_jax.errors import UserError
from vit_jax.io import storage


def check(text: str | None, steps: int) -> None:
    """Raises UserError unless a run of so many steps can trace what --profile says.

    It cannot if the text is malformed, the steps are beyond the run's end, or the installed libtpu
    would crash the profiler.
    """
    if text:
        parse(text, steps)


def parse(text: str, steps: int) -> tuple[int, int]:
    """(first, last) step, counted from 1, of STEP:COUNT; raises UserError, see `check`."""
    match = re.fullmatch(r'(\d+):(\d+)', text)
    if not match or not int(match[1]) or not int(match[2]):
        raise UserError(f'--profile is {text!r}, not STEP:COUNT, both from 1: 100:5')
    first, last = int(match[1]), int(match[1]) + int(match[2]) - 1
    if last > steps:
        raise UserError(f'--profile={text} asks for step {last}, and the run ends at step {steps}')
    if mismatch := unsupported_libtpu(jax.config.jax_platforms):
        raise UserError(f'--profile={text} would end in a segmentation fault: {mismatch}')
    return first, last


def unsupported_libtpu(platforms: str | None) -> str | None:
    """Describes a libtpu of a version that the installed JAX does not support; None if it does.

    JAX loads libtpu wherever it is installed, with or without a TPU, unless `platforms`, the value
    of jax_platforms, excludes TPUs. JAX's profiler then also starts that of libtpu, which crashes
    the process if the version is unsupported.
    """
    if platforms and 'tpu' not in platforms:
        return None
    try:
        installed = importlib.metadata.version('libtpu')
    except importlib.metadata.PackageNotFoundError:
        return None
    wanted = re.search(r'libtpu==([\d.]+)\.\*', '\n'.join(importlib.metadata.requires('jax') or []))
    if not wanted or f'{installed}.'.startswith(f'{wanted[1]}.'):
        return None
    return (
        f'libtpu is {installed}, and jax {jax.__version__} takes {wanted[1]}; where there is no '
        'TPU, set JAX_PLATFORMS=cpu or cuda,cpu, else: pip install "jax[tpu]"'
    )


class Profile:
    """Traces steps of the first process into the folder `profile` of a run.

    Args:
      steps_to_trace: STEP:COUNT. None: none.
      workdir: workdir of the run.
      steps: length of the run.
      start: step that the run resumes from.
      write_line: prints a line of text.
    """

    def __init__(
        self,
        steps_to_trace: str | None,
        workdir: os.PathLike | str,
        steps: int,
        start: int,
        write_line: Callable[[str], None],
    ):
        self.first, self.last = parse(steps_to_trace, steps) if steps_to_trace else (0, 0)
        self.path, self.write_line = epath.Path(workdir) / 'profile', write_line
        self.trace = None
        if steps_to_trace and start >= self.first:
            write_line(
                f'--profile={steps_to_trace}: the run goes on after step {start}; nothing is traced'
            )
            self.first = 0

    def __enter__(self) -> 'Profile':
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @contextlib.contextmanager
    def step(self, n: int) -> Iterator[None]:
        """Context of step n, whose outputs are passed to `end` afterwards."""
        if n == self.first and not jax.process_index():
            self.trace = tempfile.TemporaryDirectory(prefix='vit_jax_profile_')
            jax.profiler.start_trace(self.trace.name, create_perfetto_trace=True)
        with jax.profiler.StepTraceAnnotation('train', step_num=n):
            yield

    def end(self, n: int, metrics: Any) -> None:
        """Writes the trace after its last step, once the device has finished it; raises UserError.

        `metrics` is a tree of outputs of step n to wait for.
        """
        if not self.trace or n < self.last:
            return
        jax.block_until_ready(metrics)
        with storage.writing(self.path):
            jax.profiler.stop_trace()
            for source in sorted(pathlib.Path(self.trace.name).rglob('*')):
                if source.is_file():
                    target = self.path / source.relative_to(self.trace.name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(source.read_bytes())
        self.close()
        self.write_line(
            f'steps {self.first} to {self.last} are traced in {self.path}: tensorboard --logdir '
            f'{self.path} (with xprof), or perfetto_trace.json.gz at ui.perfetto.dev'
        )

    def close(self) -> None:
        """Discards an incomplete trace."""
        if self.trace:
            with contextlib.suppress(RuntimeError):  # already stopped
                jax.profiler.stop_trace()
            self.trace.cleanup()
            self.trace = None
