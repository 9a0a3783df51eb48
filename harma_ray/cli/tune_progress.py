"""A search as it goes, on the terminal: a table that is redrawn, or lines where nothing can be redrawn."""

import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from harma_ray.errors import count
from harma_ray.tune.results import SearchResults, TrialResult
from harma_ray.tune.study import Event, Report

_ENDED_SHOWN = 8
_RUNNING_SHOWN = 4
_LINE_SECONDS, _FIRST_LINE_SECONDS, _FIRST_SECONDS = 60, 10, 180
"""How long nothing is told when there is no terminal to redraw: in general, and in the beginning, and how long that is.
"""


class SearchProgress:
    """Shows events as they come."""

    def __init__(self, past: SearchResults, started: float):
        """Prepares; nothing is shown before the block is entered.

        Args:
            past: What earlier sessions found.
            started: When the command started (``time.perf_counter``).
        """
        self._definition, self._objective, self._started = past.definition, past.objective, started
        self._events: dict[int, Event] = {}
        self._num_past = len([trial for trial in past.trials if trial.state != "running"])
        self._past_trained = {trial.number: trial.trained for trial in past.trials}
        self._past_seconds = past.seconds
        self._best = _event_of(past.best_trial)
        self._console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        self._printed = self._began = time.perf_counter()
        self._printing, self._ended = threading.Lock(), threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=1, transient=True)

    def __enter__(self) -> Self:
        """Starts showing."""
        if self._console.is_terminal:
            self._live.start()
        else:
            self._ticker.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops showing."""
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._ended.set()
            self._ticker.join()

    def __call__(self, event: Event) -> None:
        """Shows an event."""
        begins = event.state == "running" and event.report is None
        self._events[event.number] = event
        if event.state in ("complete", "stopped") and self._rank(event) > self._rank(self._best):
            self._best = event
        if event.state != "running":
            self._print(self._ended_line(event))
        elif begins and not self._console.is_terminal:
            self._print(f"trial {event.number} begins: {show_params(event.params)}")

    def _tick(self) -> None:
        """Tells where the search stands whenever nothing was told for a while."""
        while not self._ended.wait(0.5):
            now = time.perf_counter()
            is_new = now - self._began < _FIRST_SECONDS
            if now - self._printed > (_FIRST_LINE_SECONDS if is_new else _LINE_SECONDS):
                self._print(self._summary())

    def _rank(self, event: Event | None) -> tuple[bool, float]:
        """Returns what the better of two ended trials has more of; a complete trial is better than a stopped one."""
        if event is None or event.report is None or not event.report.values:
            return False, -math.inf
        return event.state == "complete", self._objective.merit(event.report.value)

    def _print(self, line: str) -> None:
        clock = f"[{time.perf_counter() - self._started:7.1f} s] "
        with self._printing:
            self._console.print(clock + line, soft_wrap=True)
            self._printed = time.perf_counter()

    def _ended_line(self, event: Event) -> str:
        if event.state == "failed":
            return f"trial {event.number} failed: {event.reason}  {show_params(event.params)}"
        assert event.report is not None
        where = "" if event.state == "complete" else f" at {self._definition.unit} {event.report.progress:.9g}"
        best = f"best: trial {self._best.number}" if self._best else ""
        value = f"{self._objective.metric} {self._objective.show(event.report.value)}"
        return f"trial {event.number} {event.state}{where}: {value} ({best})  {show_params(event.params)}"

    def _summary(self) -> str:
        ended, running = self._split_events()
        parts = [f"{count(len(ended), 'trial')} ended, {len(running)} running{self._where(running)}"]
        if self._best and self._best.report:
            value = self._objective.show(self._best.report.value)
            parts.append(f"best {self._objective.metric} {value} (trial {self._best.number})")
        left = self._seconds_left()
        if left is not None:
            parts.append(f"about {_duration(left)} left")
        return "; ".join(parts)

    def _where(self, running: Sequence[Event]) -> str:
        """Returns how far the trials that run have come."""
        unit, length = self._definition.unit, self._definition.length
        reached = [f"{event.report.progress:.9g}" if event.report else "0" for event in running[:_RUNNING_SHOWN]]
        more = ", ..." if len(running) > _RUNNING_SHOWN else ""
        return f" (at {unit} {', '.join(reached)}{more} of {length})" if running else ""

    def _split_events(self) -> tuple[list[Event], list[Event]]:
        """Returns the last events of the trials that have ended, and of those that run."""
        events = list(self._events.values())
        return [event for event in events if event.state != "running"], [e for e in events if e.state == "running"]

    def _seconds_left(self) -> float | None:
        """Returns a guess from what the ended trials took and the limits that are set; None without any."""
        limits, grid = self._definition.limits, self._definition.sampler.name == "grid"
        trials = limits.trials or (len(self._definition.first_points) if grid else 0)
        elapsed = time.perf_counter() - self._began
        ended = len(self._split_events()[0])
        now = {number: event.report.trained for number, event in self._events.items() if event.report}
        in_all = sum({**self._past_trained, **now}.values())
        trained = in_all - sum(self._past_trained.values())
        guesses = []
        if limits.hours:
            guesses.append(limits.hours * 3600 - self._past_seconds - elapsed)
        if trials and ended:
            guesses.append((trials - self._num_past - ended) * elapsed / ended)
        if self._definition.budget and trained > 0:
            guesses.append((self._definition.budget - in_all) * elapsed / trained)
        return max(0.0, min(guesses)) if guesses else None

    def _table(self) -> Table:
        table = Table(title=self._summary(), title_justify="left", title_style="", expand=True)
        for name in ("trial", "state", self._definition.unit, self._objective.metric):
            table.add_column(name, justify="right" if name != "state" else "left", no_wrap=True)
        table.add_column("settings", ratio=1)
        ended, running = self._split_events()
        ended = ended[-_ENDED_SHOWN:]
        best = [self._best] if self._best and self._best not in [*running, *ended] else []
        for event in [*best, *ended, *running]:
            report = event.report
            is_best = self._best is not None and event.number == self._best.number
            table.add_row(
                f"{event.number}{' *' if is_best else ''}",
                event.state,
                f"{report.progress if report else 0:.9g}/{self._definition.length}",
                self._objective.show(report.value) if report and report.values else "",
                show_params(event.params),
                style="bold" if is_best else "dim" if event.state in ("stopped", "failed") else "",
            )
        return table


def _event_of(trial: TrialResult | None) -> Event | None:
    if trial is None or not trial.values:
        return None
    report = Report(progress=trial.trained, value=trial.value, values=trial.values, trained=trial.trained)
    return Event(trial.number, trial.state, dict(trial.params), report)


def show_params(params: Mapping[str, Any]) -> str:
    """Returns settings on one line, each under the last part of its name."""
    texts = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in params.items()}
    return " ".join(f"{name.rpartition('.')[2]}={text}" for name, text in texts.items())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
