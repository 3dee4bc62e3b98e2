"""--profile STEP:COUNT: what device and host do in some steps, for XProf and Perfetto."""

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
    """(first, last) step of STEP:COUNT, counted from 1; UserError for what a run has not."""
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
    """What is wrong with a libtpu that JAX has loaded and was not made for, else None.

    It is loaded wherever it is installed, with or without a TPU, unless `platforms`, JAX's setting,
    leave TPUs out; its profiler then starts too, and one of another version ends the process.
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
    """Traces the steps that `wish` says (None: none) into `path`/profile; of processes, the first.

    `begun` is the step that the run goes on from.
    """

    def __init__(self, wish, path, steps, begun, say):
        self.first, self.last = parsed(wish, steps) if wish else (0, 0)
        self.path, self.say, self.trace = epath.Path(path) / 'profile', say, None
        if wish and begun >= self.first:
            say(f'--profile={wish}: the run goes on after step {begun}; nothing is traced')
            self.first = 0

    @contextlib.contextmanager
    def step(self, n):
        """Around step n, whose outputs are then to be given to `end`."""
        if n == self.first and not jax.process_index():
            self.trace = tempfile.TemporaryDirectory(prefix='vit_jax_profile_')
            jax.profiler.start_trace(self.trace.name, create_perfetto_trace=True)
        with jax.profiler.StepTraceAnnotation('train', step_num=n):
            yield

    def end(self, n, metrics):
        """Writes the trace when step n is the last of it, and has been done by the device.

        Raises UserError.
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
        """Drops what is not traced to its end."""
        if self.trace:
            with contextlib.suppress(RuntimeError):  # it was stopped
                jax.profiler.stop_trace()
            self.trace.cleanup()
            self.trace = None
