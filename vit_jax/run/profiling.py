"""Traces device and host during some steps (--profile STEP:COUNT), for XProf and Perfetto."""

import contextlib
import importlib.metadata
import pathlib
import re
import tempfile

import jax
from etils import epath

from vit_jax.errors import UserError
from vit_jax.io import storage


def parsed(text, steps):
    """(first, last) step, counted from 1, of STEP:COUNT.

    Raises UserError if the text is malformed, the steps are beyond the run's end, or the installed
    libtpu would crash the profiler.
    """
    match = re.fullmatch(r'(\d+):(\d+)', text)
    if not match or not int(match[1]) or not int(match[2]):
        raise UserError(f'--profile is {text!r}, not STEP:COUNT, both from 1: 100:5')
    first, last = int(match[1]), int(match[1]) + int(match[2]) - 1
    if last > steps:
        raise UserError(f'--profile={text} asks for step {last}, and the run ends at step {steps}')
    if strange := strange_libtpu(jax.config.jax_platforms):
        raise UserError(f'--profile={text} would end in a segmentation fault: {strange}')
    return first, last


def strange_libtpu(platforms):
    """Describes a libtpu of a version that the installed JAX does not support; None if it is fine.

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
      wish: steps to trace, as STEP:COUNT. None: none.
      path: workdir of the run.
      steps: length of the run.
      begun: step that the run resumes from.
      say: prints a line of text.
    """

    def __init__(self, wish, path, steps, begun, say):
        self.first, self.last = parsed(wish, steps) if wish else (0, 0)
        self.path, self.say, self.trace = epath.Path(path) / 'profile', say, None
        if wish and begun >= self.first:
            say(f'--profile={wish}: the run goes on after step {begun}; nothing is traced')
            self.first = 0

    @contextlib.contextmanager
    def step(self, n):
        """Context of step n, whose outputs are passed to `end` afterwards."""
        if n == self.first and not jax.process_index():
            self.trace = tempfile.TemporaryDirectory(prefix='vit_jax_profile_')
            jax.profiler.start_trace(self.trace.name, create_perfetto_trace=True)
        with jax.profiler.StepTraceAnnotation('train', step_num=n):
            yield

    def end(self, n, metrics):
        """Writes the trace after its last step, once the device has finished it; raises UserError.

        `metrics` are outputs of step n to wait for.
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
        self.say(
            f'steps {self.first} to {self.last} are traced in {self.path}: tensorboard --logdir '
            f'{self.path} (with xprof), or perfetto_trace.json.gz at ui.perfetto.dev'
        )

    def close(self):
        """Discards an incomplete trace."""
        if self.trace:
            with contextlib.suppress(RuntimeError):  # already stopped
                jax.profiler.stop_trace()
            self.trace.cleanup()
            self.trace = None
