"""A model card: what a Hugging Face folder says of itself, for people and for the hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

import harma_ray
from harma_ray.errors import count
from harma_ray.evaluation import Metrics
from harma_ray.models.openclip import open_clip

_LICENCES = {"openai": "mit", "laion": "mit", "datacomp": "mit"}
"""Of open_clip's weights, by how their tags begin."""


@dataclass(frozen=True)
class CardFigures:
    """What a model reached on a split."""

    split: str
    data: str
    """Name of the data set."""
    metrics: Mapping[str, float]
    fingerprint: str = ""
    rows: int = 0
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """95 % intervals; empty: not known."""


@dataclass(frozen=True)
class Card:
    """All that a card says."""

    name: str
    """Of the model."""
    recipe: str
    tags: Sequence[str]
    """The first says the task."""
    pretrained: tuple[str, str]
    """Architecture and weights that the model started from, without any path."""
    backbone: str
    """The same in a sentence, with the fingerprint and where they are."""
    data: Mapping[str, Mapping[str, Any]]
    """``fingerprint`` and ``rows`` of the splits, by name."""
    data_name: str
    figures: Sequence[CardFigures]
    stood: str
    """Which checkpoint of the run it is."""
    settings: str
    """The run's settings, YAML."""

    def render(self, metrics: Metrics) -> str:
        """Returns the Markdown, the hub's YAML first; `metrics` are the task's."""
        blocks = [
            f"---\n{self._front_matter(metrics)}\n---",
            f"# {self.name}\n\n{self.recipe}, trained with harma_ray {harma_ray.__version__}: {self.stood}.",
            f"## Load\n\n{self._loading()}",
            f"## Data\n\n{self._data()}",
            f"## Figures\n\n{self._figures(metrics)}",
            f"## Backbone\n\n{self.backbone}\n\n{_terms(self.pretrained[1])[1]}",
            f"## Settings\n\n```yaml\n{self.settings.strip()}\n```",
        ]
        return "\n\n".join(blocks) + "\n"

    def _front_matter(self, metrics: Metrics) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        results = [
            EvalResult(
                task_type=self.tags[0],
                dataset_type=found.data,
                dataset_name=found.data,
                dataset_split=found.split,
                dataset_revision=found.fingerprint or None,
                metric_type=name,
                metric_name=metrics.label(name) or name,
                metric_value=round(value, 4),
            )
            for found in self.figures
            for name, value in found.metrics.items()
        ]
        licence = _terms(self.pretrained[1])[0]
        known = {"eval_results": results, "model_name": self.name} if results else {}
        card = ModelCardData(
            library_name="harma-ray",
            license=licence,
            license_name="see-the-backbone" if licence == "other" else None,
            base_model=_hub_name(*self.pretrained) or None,
            tags=list(self.tags),
            datasets=[self.data_name] if self.data_name else None,
            **known,
        )
        return card.to_yaml().strip()

    def _loading(self) -> str:
        code = f'from harma_ray.api import load_run\n\nrun = load_run("{self.name}")  # this folder'
        commands = f"python launch.py evaluate --run {self.name} --data DATA --split test"
        return f"```python\n{code}\n```\n\n```bash\n{commands}\n```"

    def _data(self) -> str:
        if not self.data:
            return "The run does not say which data it was trained on."
        rows = [[self.data_name, split, found["rows"], found["fingerprint"]] for split, found in self.data.items()]
        return tabulate(rows, ["data set", "split", "rows", "fingerprint"], "github", disable_numparse=True)

    def _figures(self, metrics: Metrics) -> str:
        if not self.figures:
            return "None: the run was not evaluated."
        blocks = []
        for found in self.figures:
            rows = [
                [name, metrics.label(name) or name, metrics.show(name, value), _interval(metrics, found, name)]
                for name, value in found.metrics.items()
            ]
            size = f", {count(found.rows, 'row')} (fingerprint {found.fingerprint[:12]})" if found.fingerprint else ""
            title = f"`{found.split}` of {found.data}{size}:"
            table = tabulate(rows, ["metric", "", "value", "95 % interval"], "github", disable_numparse=True)
            blocks.append(f"{title}\n\n{table}")
        if not all(found.intervals for found in self.figures):
            blocks.append("Where no intervals stand, none were computed.")
        return "\n\n".join(blocks)


def _interval(metrics: Metrics, found: CardFigures, name: str) -> str:
    return "-".join(metrics.show(name, bound) for bound in found.intervals.get(name, ()))


def _terms(pretrained: str) -> tuple[str, str]:
    """Returns the licence of weights by the hub's names, and a sentence on it."""
    known = next((licence for start, licence in _LICENCES.items() if pretrained.startswith(start)), None)
    if known:
        return known, f"The weights `{pretrained}` are published under the {known.upper()} licence."
    if pretrained in ("", "random"):
        return "other", "Nobody else's weights are in it: whoever trained it chooses the licence, as the data permits."
    return "other", (
        f"The name `{pretrained}` does not tell under which licence the weights were published that this model started "
        "from: it holds for this model, too."
    )


def _hub_name(architecture: str, pretrained: str) -> str:
    """Returns the hub's name of open_clip's weights; empty: it has none."""
    if not open_clip.is_pretrained_cfg(architecture, pretrained):
        return ""
    return open_clip.get_pretrained_cfg(architecture, pretrained).get("hf_hub", "").strip("/")
