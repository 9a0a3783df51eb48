"""Whether a training learns anything, as its record tells it.

Three things are watched. The scores of a batch may all have become equal: then each term of the loss stands at a value
that is known in closed form. The loss may be no better than such scores would make it. And no epoch may be better than
the model before any training, by more than the 95 % interval of that one's figure, where it has one. All of it follows
from the lines of the record alone, so a resumed run, a search and a page come to the same findings.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from harma_ray.config import StartConfig
from harma_ray.errors import count
from harma_ray.evaluation import Evaluation, Metrics
from harma_ray.task import Task
from harma_ray.training.optim import warmup_steps

KIND = "health"
"""Kind of the record's lines that `Finding.as_record` makes."""
EQUAL_TOLERANCE = 0.005
"""How near to its value at equal scores, relative to it, a term must be to count as equal."""
BETTER_FRACTION = 0.01
"""By how much a term must be below its value at equal scores to count as better than chance."""
EQUAL_STEPS, CHANCE_STEPS, LEAST_VALUES = 20, 50, 3
"""Steps after the warm-up, and recorded losses among them, that a finding rests on; half of a short training's."""
ADVICE_STEPS = 20
"""Planned steps after the warm-up from which on settings are advised; a shorter training is advised to be longer."""

INTERVAL = "interval_95"
"""Key of the 95 % interval of the objective in the line of the record that tells the figures before any training."""

Problem = Literal["equal scores", "no better than chance", "no better than untrained"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a training, or is not any more."""

    problem: Problem
    since: int
    """Step that it began at."""
    message: str
    """What was found, in one sentence without a full stop."""
    advice: tuple[str, ...] = ()
    """What to try, the most promising first."""
    over: bool = False
    """Whether it has passed."""

    @property
    def subject(self) -> Literal["epochs", "loss"]:
        """What is wrong; of each there is one finding at a time."""
        return "epochs" if self.problem == "no better than untrained" else "loss"

    def as_record(self) -> dict[str, Any]:
        """Returns the keys of a line of the record, or of an entry of the report."""
        return {**asdict(self), "advice": list(self.advice)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Returns the finding that a line of the record or an entry of the report tells."""
        return cls(record["problem"], record["since"], record["message"], tuple(record["advice"]), record["over"])


class HealthWatch:
    """Reads the record of a training line by line and tells what is wrong, once each time it begins or ends."""

    def __init__(
        self, equal_scores: Mapping[str, float], *, metrics: Metrics, total_steps: int, warmup_steps: int,
        patience: int = 0, advice: Sequence[str] = (), start: str = StartConfig().title,
    ):  # fmt: skip
        """Starts at the beginning of a record.

        Args:
            equal_scores: Terms of the loss and what each is while all scores of a batch are equal; empty: the loss is
                not watched.
            metrics: Their objective picks the best epoch.
            total_steps: Planned steps.
            warmup_steps: Steps in which the learning rate climbs; a loss that does not fall yet is no finding there.
            patience: Evaluations without a better one that end the training; 0: none do.
            advice: What to try when nothing is learned, if there are `ADVICE_STEPS`.
            start: What the model of step 0 is called.
        """
        basis = total_steps - warmup_steps
        longer = f"a longer training: {count(basis, 'step')} after the warm-up tell nothing of other settings"
        self._advice = tuple(advice) if basis >= ADVICE_STEPS else (longer,)
        self._start = start
        self._equal = {f"loss_{name}": value for name, value in equal_scores.items() if value > 0}
        self._metrics, self._total_steps, self._warmup_steps = metrics, total_steps, warmup_steps
        self._patience, self._without_improvement = patience, 0
        self._longest = max(1, (total_steps - warmup_steps) // 2)
        self._recent: deque[tuple[int, dict[str, float]]] = deque()
        self._equal_since: int | None = None
        self._baseline: float | None = None
        self._interval: Sequence[float] = ()
        self._best: tuple[float, float] | None = None
        self._standing: dict[str, Finding] = {}

    @property
    def standing(self) -> list[Finding]:
        """What is wrong now."""
        return list(self._standing.values())

    def read(self, record: Mapping[str, Any]) -> list[Finding]:
        """Takes the next line of the record; returns what begins or ends with it."""
        read = {"step": self._read_step, "evaluation": self._read_evaluation}.get(record["kind"])
        finding = read and read(record)
        if finding is None:
            return []
        _note(self._standing, finding)
        return [finding]

    def _read_step(self, record: Mapping[str, Any]) -> Finding | None:
        terms = {name: record.get(name) for name in self._equal}
        known = {name: value for name, value in terms.items() if value is not None}
        if not known or len(known) < len(terms) or record["step"] <= self._warmup_steps:
            return None
        step, recent = record["step"], self._recent
        recent.append((step, known))
        while len(recent) > LEAST_VALUES and step - recent[1][0] >= self._span(CHANCE_STEPS):
            recent.popleft()
        ratios = {name: value / self._equal[name] for name, value in known.items()}
        if any(abs(ratio - 1) > EQUAL_TOLERANCE for ratio in ratios.values()):
            self._equal_since = None
        elif self._equal_since is None:
            self._equal_since = step
        standing = self._standing.get("loss")
        if standing is None or standing.problem != "equal scores":
            equal = self._scores_are_equal(step)
            if equal or standing is None:
                return equal or self._loss_is_no_better(step)
        if all(min(ratios.values()) < 1 - BETTER_FRACTION for ratios in self._ratios(self._span(EQUAL_STEPS))):
            message = f"the loss is better than chance again ({self._beside_chance(known)})"
            return Finding(standing.problem, standing.since, message, over=True)
        return None

    def _scores_are_equal(self, step: int) -> Finding | None:
        since = self._equal_since
        if since is None or step - since < self._span(EQUAL_STEPS):
            return None
        within = [values for at, values in self._recent if at >= since]
        if len(within) < LEAST_VALUES:
            return None
        message = (
            f"all scores of a batch have been equal since step {since} ({self._beside_chance(within[-1])}): the "
            "embeddings have collapsed into one, and nothing is learned from them"
        )
        return Finding("equal scores", since, message, self._advice)

    def _loss_is_no_better(self, step: int) -> Finding | None:
        since = self._recent[0][0]
        if len(self._recent) < LEAST_VALUES or step - since < self._span(CHANCE_STEPS):
            return None
        values = [terms for _, terms in self._recent]
        means, half = _means(values), len(values) // 2
        earlier, later = _means(values[:half]), _means(values[half:])
        no_better = all(mean >= self._equal[name] * (1 - EQUAL_TOLERANCE) for name, mean in means.items())
        falling = any(later[name] < earlier[name] * (1 - BETTER_FRACTION) for name in means)
        if not no_better or falling:
            return None
        message = (
            f"the loss has been no better than chance since step {since} (on average {self._beside_chance(means)})"
        )
        return Finding("no better than chance", since, message, self._advice)

    def _read_evaluation(self, record: Mapping[str, Any]) -> Finding | None:
        objective, is_better = self._metrics.objective, self._metrics.is_better
        value = record.get(objective)
        if value is None:
            return None
        if record["step"] == 0:
            self._baseline, self._interval = value, record.get(INTERVAL, ())
            return None
        earlier = [each for each in (self._baseline, self._best and self._best[0]) if each is not None]
        is_improved = all(is_better(objective, value, each) for each in earlier)
        self._without_improvement = 0 if is_improved else self._without_improvement + 1
        if self._best is None or is_better(objective, value, self._best[0]):
            self._best = (value, record["epoch"])
        if self._baseline is None:
            return None
        standing, (best, epoch), baseline = self._standing.get("epochs"), self._best, self._baseline
        bound = max((baseline, *self._interval), key=lambda value: self._metrics.merit(objective, value))
        shown, before, *ends = (self._metrics.show(objective, each) for each in (best, baseline, *self._interval))
        before += f", 95 % CI {'-'.join(ends)}" if ends else ""
        what = f"{record['split']} {objective}"
        if is_better(objective, best, bound):
            message = f"epoch {epoch:g} is better than {self._start} ({what} {shown} against {before})"
            return standing and Finding(standing.problem, standing.since, message, over=True)
        beyond = " by more than chance may bring" if is_better(objective, best, baseline) else ""
        message = (
            f"no epoch is better than {self._start}{beyond} ({what} {before}; the best since, in epoch "
            f"{epoch:g}, {shown})"
        )
        is_last = record["step"] == self._total_steps or 0 < self._patience <= self._without_improvement
        is_begun = standing is None and (is_last or record["step"] >= self._total_steps / 2)
        if is_begun or (is_last and standing is not None and standing.message != message):
            return Finding("no better than untrained", 0, message, self._advice)
        return None

    def _span(self, steps: int) -> int:
        return min(steps, self._longest)

    def _ratios(self, span: int) -> Iterator[dict[str, float]]:
        """Yields the last recorded terms, over a span of steps, as parts of their values at equal scores."""
        last = self._recent[-1][0]
        for step, values in self._recent:
            if last - step <= span:
                yield {name: value / self._equal[name] for name, value in values.items()}

    def _beside_chance(self, values: Mapping[str, float]) -> str:
        return "; ".join(
            f"{name} {value:.4g}, with equal scores {self._equal[name]:.4g}" for name, value in values.items()
        )


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: math.fsum(terms[name] for terms in values) / len(values) for name in values[0]}


def standing_findings(records: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Returns what is wrong at the end of a record, as its lines of kind ``health`` tell it."""
    standing: dict[str, Finding] = {}
    for record in records:
        if record["kind"] == KIND:
            _note(standing, Finding.of(record))
    return list(standing.values())


def _note(standing: dict[str, Finding], finding: Finding) -> None:
    """Puts a finding in the place of what was wrong with its subject before."""
    standing.pop(finding.subject, None)
    if not finding.over:
        standing[finding.subject] = finding


def objective_interval(evaluation: Evaluation, metrics: Metrics) -> dict[str, list[float]]:
    """Returns what the line of the model before any training holds beside its figures; nothing without an interval."""
    bounds = evaluation.intervals().get(metrics.objective)
    return {INTERVAL: list(bounds)} if bounds else {}


def health_watch(task: Task, total_steps: int) -> HealthWatch:
    """Returns who watches a training of some steps from its first one on."""
    return HealthWatch(
        task.losses_at_equal_scores(),
        metrics=task.metrics,
        total_steps=total_steps,
        warmup_steps=warmup_steps(total_steps, task.config.optim),
        patience=task.config.train.early_stopping_patience,
        advice=task.advice(),
        start=task.config.started_from.title,
    )
