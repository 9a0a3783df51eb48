"""The record of a run: ``metrics.jsonl`` and TensorBoard events, written by one worker.

Records after the step that a run resumes at are removed first, so a record never tells of steps that were thrown away.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from harma_ray.errors import UserError
from harma_ray.evaluation import Projection
from harma_ray.files import write_text
from harma_ray.training.health import KIND, Finding, HealthWatch, standing_findings
from harma_ray.training.run_files import METRICS_NAME, read_records

EVENTS_FOLDER = "tensorboard"


class Tracker:
    """Writes the record of a run."""

    def __init__(self, run_dir: Path, last_step: int | None, watch: HealthWatch | None = None):
        """Opens the record.

        Args:
            run_dir: The run's folder.
            last_step: The step whose checkpoint the run goes on from; later records are removed. None = it starts
                anew, and all are.
            watch: Reads along, earlier lines too; what it finds is recorded.
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
        self._writer = SummaryWriter(str(run_dir / EVENTS_FOLDER), purge_step=first if goes_on else None, flush_secs=10)
        self._watch = watch
        if watch is not None:
            for record in kept:
                watch.read(record)
            known = standing_findings(kept)
            self._log_findings(first - 1, [finding for finding in watch.standing if finding not in known])

    def log(self, kind: str, step: int, values: Mapping[str, float], *, prefix: str = "", **more: Any) -> None:
        """Records values.

        Args:
            kind: What is recorded: ``step``, ``evaluation``, ``notice``, ...
            step: Optimiser steps done.
            values: Finite or not; JSON gets null where TensorBoard gets NaN.
            prefix: Group of the tags in TensorBoard, such as ``train/``.
            more: Further keys of the JSON line.
        """
        record = {"kind": kind, "step": step, **more, **{key: _finite(value) for key, value in values.items()}}
        with self._writing():
            self._file.write(json.dumps(record) + "\n")
            for key, value in values.items():
                self._writer.add_scalar(prefix + key, value, step)
            if self._watch is not None:
                self._log_findings(step, self._watch.read(record))

    def _log_findings(self, step: int, findings: Sequence[Finding]) -> None:
        for finding in findings:
            self._file.write(json.dumps({"kind": KIND, "step": step, **finding.as_record()}) + "\n")
            self._writer.add_text(KIND, finding.message, step)

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with the training now."""
        return self._watch.standing if self._watch is not None else []

    def log_image(self, tag: str, step: int, image: Image.Image) -> None:
        """Records a picture in TensorBoard."""
        with self._writing():
            self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def log_hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Records settings with final metrics for TensorBoard's HParams page."""
        with self._writing():
            write_hparams(self._writer, settings, {f"final/{k}": v for k, v in metrics.items()})

    def log_embeddings(self, points: Projection, step: int) -> None:
        """Records points for TensorBoard's projector."""
        with self._writing():
            self._writer.add_embedding(
                points.vectors, metadata=points.labels, label_img=points.thumbnails, global_step=step, tag="embeddings"
            )

    def close(self) -> None:
        """Flushes and closes the record.

        Raises:
            UserError: If the disk is full or the folder cannot be written.
        """
        with self._writing():
            try:
                self._file.close()
            finally:
                self._writer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the record of run {self._path.parent} ({error.strerror}); free some space and resume"
            ) from error


def write_hparams(writer: SummaryWriter, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Writes settings and metrics for TensorBoard's HParams page, beside the run's other events."""
    plain = {k: v if isinstance(v, str | bool | int | float) else str(v) for k, v in settings.items()}
    writer.add_hparams(plain, dict(metrics), run_name=".")


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
