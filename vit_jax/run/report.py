"""Reports of a run during training: metrics.jsonl, TensorBoard, progress bar, throughput."""

import contextlib
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from vit_jax.distributed import devices
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.bounds import Positive
from vit_jax.io.progress import Bar
from vit_jax.io.text import finite, number, to_json
from vit_jax.run import history

CHECKED = ('loss', 'grad_norm', 'param_norm')  # metrics that end a run where one is not finite
OMITTED = ('lr', 'grad_norm', 'param_norm')  # metrics of every step that the bar omits


class NotFinite(Exception):
    """A non-finite loss, gradient or parameter; `step` counts from 1."""

    def __init__(self, step: int, metrics: Mapping[str, float]):
        self.step = step
        super().__init__(
            f'step {step}: not finite: loss {metrics["loss"]:g}, gradient norm '
            f'{metrics["grad_norm"]:g}, parameter norm {metrics["param_norm"]:g}, learning rate '
            f'{metrics["lr"]:g}'
        )

    def with_examples(self, ids: Iterable[int]) -> 'NotFinite':
        """Adds the ids of the step's examples to the message and returns self."""
        self.args = (f'{self}; example ids of the batch: {" ".join(map(str, ids))}',)
        return self


class Report:
    """Writes the metrics of training and evaluation to metrics.jsonl, TensorBoard and the terminal.

    Metrics are read one step late, so that the device never waits for the host. Only the first
    process writes; all of them read the metrics, which carry the votes to stop.

    Args:
      workdir: workdir of the run.
      steps: length of the run.
      batch_size: examples a step.
      start: step that the run goes on from; lines of later steps are dropped and written again.
      flops_per_image: of a forward pass. None: unknown.
      stop: gets the votes to stop from the metrics. None: there are none.
      warn: (step, metrics) -> a warning, or None; see objectives.Objective.
      every: steps between two lines of training metrics.
    """

    def __init__(
        self,
        workdir: os.PathLike | str,
        steps: int,
        batch_size: int,
        start: int,
        flops_per_image: float | None,
        stop: Stop | None = None,
        warn: Callable[[int, Mapping[str, float]], str | None] | None = None,
        *,
        every: Positive[int] = 50,
    ):
        self.path = epath.Path(workdir) / 'metrics.jsonl'
        self.steps, self.batch_size, self.every = steps, batch_size, every
        self.flops_per_image, self.stop = flops_per_image, Stop() if stop is None else stop
        self.warn = warn
        device = devices.DEVICES.get(jax.devices()[0].device_kind)
        self.peak = device and device.flops  # unknown devices have no MFU
        self.pending = None
        lines, self.damaged = history.split_lines(storage.read(self.path) or b'')
        self.lines = [line for line in lines if line['step'] <= start]
        self.seconds = max((line.get('seconds', 0) for line in self.lines), default=0)
        self.began = time.time()
        self.clock = None  # (time, step, seconds spent waiting for data) at the last line
        self.waited = 0.0
        self.writes = jax.process_index() == 0
        self.bar = Bar(
            'step', steps, start, text='compiling', stream='stdout', shown=self.writes
        )
        if self.writes:
            self.open(start)

    def open(self, start: int) -> None:
        """Rewrites the lines to keep, atomically, and opens the file for appending."""
        history.report_damaged(self.path, self.damaged)
        history.set_aside(self.path, self.damaged)
        text = ''.join(to_json(line) + '\n' for line in self.lines)
        self.file = storage.Growing(self.path, text.encode())
        folder = self.path.parent / 'tensorboard'
        storage.make_folder(folder)
        name = f'events.out.tfevents.{self.began:010.0f}.{socket.gethostname()}.{os.getpid()}'
        self.events = RecordWriter(storage.Growing(folder / name))
        self.write_event(file_version='brain.Event:2')
        if start:  # makes TensorBoard hide what an earlier process logged after this step
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self.write_event(step=start + 1, session_log=log)

    def write_event(self, **fields: Any) -> None:
        """Writes an event of TensorBoard."""
        event = event_pb2.Event(wall_time=time.time(), **fields)
        self.events.write(event.SerializeToString())

    def __enter__(self) -> 'Report':
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
        if self.writes:
            try:
                self.file.close()
                self.events.close()
            except UserError:
                if exception[0] is None:
                    raise  # else the first exception is reported

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as time spent waiting for data."""
        before = time.time()
        yield
        self.waited += time.time() - before

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of the block from images/s."""
        before = time.time()
        yield
        if self.clock:
            then, step, waited = self.clock
            self.clock = then + time.time() - before, step, waited

    def write(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Accepts the metrics of a step, still on the device; reads those of the step before."""
        previous, self.pending = self.pending, (step, metrics)
        if previous:
            self.read(*previous)

    def sync(self) -> None:
        """Reads the pending metrics and flushes the file; raises NotFinite."""
        previous, self.pending = self.pending, None
        if previous:
            self.read(*previous)
        if self.writes:
            self.file.sync()

    def read(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Waits for the metrics of a step and reports them; raises NotFinite."""
        sums = self.stop.read_votes(jax.device_get(metrics))
        values = {k: float(v) for k, v in sums.items()}
        if not all(math.isfinite(values[k]) for k in CHECKED):
            self.append(step, values)
            raise NotFinite(step, values)
        if skipped := int(values.pop('skipped', 0)):
            self.append(step, {'skipped': skipped})  # per step, so the sum is right after a resume
        speed = self.speed(step)
        if step % self.every == 0 or step == self.steps:
            self.append(step, values | speed)
            if self.warn is not None and (text := self.warn(step, values)):
                self.print(f'step {step}  warning: {text}')
                self.warn = None
            self.clock = time.time(), step, self.waited
        elif self.clock is None:
            self.clock = time.time(), step, self.waited  # compilation is over
        self.bar.update(step, progress_text(values, speed.get('images_per_s')))

    def speed(self, step: int) -> dict[str, float]:
        """Throughput since the last line: images/s, share of time waiting for data, MFU."""
        now = time.time()
        result = {'seconds': round(self.seconds + now - self.began, 3)}
        if self.clock and step > self.clock[1] and now > self.clock[0]:
            then, last, waited = self.clock
            rate = (step - last) * self.batch_size / (now - then)
            result |= {'images_per_s': rate, 'data_wait': (self.waited - waited) / (now - then)}
            if self.peak and self.flops_per_image:
                flops = 3 * self.flops_per_image * rate  # backward pass: twice the forward pass
                result['mfu'] = flops / (self.peak * jax.device_count())
        return result

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a line of metrics."""
        line = finite({'step': step, **metrics})
        self.lines.append(line)
        if self.writes:
            self.file.write((to_json(line) + '\n').encode())
            values = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
            self.write_event(step=step, summary=summary_pb2.Summary(value=values))

    def write_evaluation(self, step: int, name: str, metrics: Mapping[str, float]) -> None:
        """Writes the result of an evaluation."""
        seconds = {'seconds': round(self.seconds + time.time() - self.began, 3)}
        self.append(step, {f'{name}/{k}': v for k, v in metrics.items()} | seconds)
        if self.writes:
            self.file.sync()
        text = '  '.join(f'{k} {number(v)}' for k, v in metrics.items())
        self.print(f'step {step}  {name}: {text}')

    def evaluated(self, step: int, names: Collection[str]) -> set[str]:
        """The evaluations among `names` that have results at a step."""
        keys = {key for line in self.lines if line['step'] == step for key in line}
        owners = (
            max((n for n in names if key.startswith(f'{n}/')), key=len, default=None)
            for key in keys
        )  # fmt: skip
        return set(owners) - {None}

    def history(self, key: str | None) -> dict[int, float]:
        """{step: value} of a metric, NaN if it was not finite; {} for None."""
        values = {line['step']: line[key] for line in self.lines if key in line}
        return {step: math.nan if value is None else value for step, value in values.items()}

    def print(self, text: str) -> None:
        """Prints lines of text, above the progress bar if there is one."""
        self.bar.print(text)

    def result(self) -> dict[str, Any]:
        """The part of result.json about the run as a whole."""
        metrics = {}
        for line in self.lines:
            metrics |= {k: v for k, v in line.items() if k not in ('step', 'seconds', 'skipped')}
        rates = list(self.history('images_per_s').values())
        return {
            'metrics': metrics,
            'steps': self.steps,
            'examples_seen': self.steps * self.batch_size,
            'examples_skipped': sum(line.get('skipped', 0) for line in self.lines),
            'seconds': round(self.seconds + time.time() - self.began, 1),
            'images_per_s': round(statistics.median(rates), 1) if rates else None,
            'flops_per_image': self.flops_per_image,
            'device_kind': jax.devices()[0].device_kind,
            'device_count': jax.device_count(),
        }


def progress_text(metrics: Mapping[str, float], images_per_s: float | None) -> str:
    """Metrics of a step and its throughput for the progress bar, the loss first."""
    named = sorted(metrics.items(), key=lambda item: item[0] != 'loss')
    text = [f'{k} {v:.3f}' for k, v in named if k not in OMITTED]
    return '  '.join([*text, f'{images_per_s:,.0f} images/s'] if images_per_s else text)
