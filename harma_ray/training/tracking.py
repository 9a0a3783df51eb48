"""The record of a run, ``metrics.jsonl``, written by one worker, who sends the figures on to where they are drawn.

Records after the step that a run resumes at are removed first, so a record never tells of steps that were thrown away.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harma_ray.config import RunConfig
from harma_ray.errors import UserError
from harma_ray.evaluation import Metrics, Projection
from harma_ray.files import write_text
from harma_ray.training.health import KIND, Finding, HealthWatch, standing_findings
from harma_ray.training.run_files import METRICS_NAME, read_records
from harma_ray.training.services import open_services
from harma_ray.training.sinks import Label, Sink, final_points, final_table
from harma_ray.training.tensorboard import TensorBoard


class Tracker:
    """Writes the record of a run, and sends its figures on."""

    def __init__(
        self, run_dir: Path, last_step: int | None, watch: HealthWatch | None, config: RunConfig, label: Label
    ):
        """Opens the record.

        Args:
            run_dir: The run's folder.
            last_step: The step whose checkpoint the run goes on from; later records are removed. None = it starts
                anew, and all are.
            watch: Reads along, earlier lines too; what it finds is recorded.
            config: The run's settings; they say where else figures go.
            label: What the run is called there.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_NAME
        goes_on = self._path.exists()
        first = 0 if last_step is None else last_step + 1
        kept = [record for record in read_records(run_dir) if record["step"] < first and record["kind"] != "final"]
        if goes_on:
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        with self._writing():
            self._file = self._path.open("a", buffering=1)
            self._sinks: list[Sink] = [TensorBoard(run_dir, config, label, purge_step=first if goes_on else None)]
        self._watch = watch
        if watch is not None:
            for record in kept:
                watch.read(record)
            known = standing_findings(kept)
            self._log_findings(first - 1, [finding for finding in watch.standing if finding not in known])
        self._step = max(first - 1, 0)
        self._sinks += open_services(run_dir, config, label, on_failure=self._log_notice)

    def log(
        self, kind: str, step: int, values: Mapping[str, float], curves: Mapping[str, float] | None = None, **more: Any
    ) -> None:
        """Records values.

        Args:
            kind: What is recorded: ``step``, ``evaluation``, ``notice``, ...
            step: Optimiser steps done.
            values: Finite or not; JSON gets null where TensorBoard gets NaN.
            curves: What of them is drawn, by the names of its curves, see `harma_ray.training.sinks`.
            more: Further keys of the JSON line.
        """
        self._step = step
        record = {"kind": kind, "step": step, **more, **{key: _finite(value) for key, value in values.items()}}
        with self._writing():
            self._file.write(json.dumps(record) + "\n")
            for sink in self._sinks:
                sink.log(curves or {}, step)
            if self._watch is not None:
                self._log_findings(step, self._watch.read(record))

    def _log_notice(self, text: str) -> None:
        self.log("notice", self._step, {}, text=text)

    def _log_findings(self, step: int, findings: Sequence[Finding]) -> None:
        for finding in findings:
            self._file.write(json.dumps({"kind": KIND, "step": step, **finding.as_record()}) + "\n")
            for sink in self._sinks:
                sink.log_text(KIND, finding.message, step)

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with the training now."""
        return self._watch.standing if self._watch is not None else []

    def log_image(self, tag: str, step: int, image: Image.Image) -> None:
        """Draws a picture beside the curves."""
        with self._writing():
            for sink in self._sinks:
                sink.log_image(tag, image, step)

    def log_results(
        self, step: int, results: Mapping[str, Mapping[str, float]], metrics: Metrics, *, curve_of: str
    ) -> None:
        """Records the final figures of each split, and shows them as a table.

        Args:
            step: Optimiser steps done.
            results: Figures by split.
            metrics: What they are.
            curve_of: The split that has curves; the others' figures are points.
        """
        for split, found in results.items():
            points = {} if split == curve_of else final_points(split, found, metrics)
            self.log("final", step, found, points, split=split)
        figures = {f"final/{split}_{name}": value for split, found in results.items() for name, value in found.items()}
        with self._writing():
            for sink in self._sinks:
                sink.log_text("final figures", final_table(results, metrics), step)
                sink.log_results(figures, step)

    def log_embeddings(self, points: Projection, step: int) -> None:
        """Shows points in TensorBoard's projector."""
        with self._writing():
            for sink in self._sinks:
                sink.log_embeddings(points, step)

    def close(self, *, done: bool) -> None:
        """Flushes and closes the record.

        Args:
            done: Whether the training has ended, else it may go on later.

        Raises:
            UserError: If the disk is full or the folder cannot be written.
        """
        with self._writing(), contextlib.ExitStack() as stack:
            stack.callback(self._file.close)
            for sink in self._sinks:
                stack.callback(sink.close, done=done)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the record of run {self._path.parent} ({error.strerror}); free some space and resume"
            ) from error


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
