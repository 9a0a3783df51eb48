"""A run's figures in TensorBoard's event files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from harma_ray.config import RunConfig
from harma_ray.evaluation import Projection
from harma_ray.settings import flat_settings, to_dict
from harma_ray.training.sinks import Label, Sink

EVENTS_FOLDER = "tensorboard"


class TensorBoard(Sink):
    """Writes event files into a run's folder.

    The HParams page gets the settings when the run begins, and finds the figures in the curves' last points. It is not
    given a table of its own (`SummaryWriter.add_hparams` writes one a run, and TensorBoard takes any one of them for
    all runs of a folder): it then shows the settings of all runs, first those in which they differ.
    """

    def __init__(self, run_dir: Path, config: RunConfig, label: Label, purge_step: int | None):
        """Opens a new file.

        Args:
            run_dir: The run's folder.
            config: Its settings.
            label: Says which of them are shown.
            purge_step: Points from this step on, in earlier files, are not shown; None: there are none.
        """
        self._writer = SummaryWriter(str(run_dir / EVENTS_FOLDER), purge_step=purge_step, flush_secs=10)
        settings = flat_settings(to_dict(config))
        shown = {name: settings[name] for name in label.shown if name in settings}
        plain = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in shown.items()}
        plain |= {
            k: Path(v).name for k, v in plain.items() if isinstance(v, str) and v.startswith("/")
        }  # fits a column
        self._write_summary(hparams_pb(plain, trial_id=label.repeats))

    def log(self, curves: Mapping[str, float], step: int) -> None:
        """Writes scalars."""
        for tag, value in curves.items():
            self._writer.add_scalar(tag, value, step)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Writes a text."""
        self._writer.add_text(tag, text, step)

    def log_image(self, tag: str, image: Image.Image, step: int) -> None:
        """Writes a picture."""
        self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def log_embeddings(self, points: Projection, step: int) -> None:
        """Writes points for the projector."""
        self._writer.add_embedding(
            points.vectors, metadata=points.labels, label_img=points.thumbnails, global_step=step, tag="embeddings"
        )

    def close(self, *, done: bool) -> None:
        """Writes what is left; a training that is done is a success on the HParams page."""
        try:
            if done:
                self._write_summary(hparams({}, {})[2])
        finally:
            self._writer.close()

    def _write_summary(self, summary: Any) -> None:
        assert self._writer.file_writer is not None
        self._writer.file_writer.add_summary(summary)
