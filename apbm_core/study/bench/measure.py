"""Timing things against each other, and the tables that say what came out.

A machine's speed drifts by more than the differences of interest: with its temperature, its load, its neighbours. So
things that are compared take turns, round by round, and what is reported is the median over the rounds of the ratio
*within* a round, with the quartiles beside it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apbm_core.study.training.device import synchronize

_LONG = 1.0  # seconds of a first call after which no second one is needed to know how long it takes


@dataclass(frozen=True)
class Settings:
    """Where and how thoroughly to measure.

    Attributes:
        device: what computes.
        threads: torch's threads, and ONNX Runtime's.
        quick: says in every table that its numbers are rough.
        compile: also measure torch.compile.
        batch_size: images of a training step.
        seconds: how long one comparison may take, its warm-up aside, once it has had its fewest rounds.
        rounds: the fewest and the most rounds of a comparison.
        shortest: seconds that one measurement takes at least; what is faster is repeated within it.
        score_images: images that HRank's criterion looks at; the paper takes 640.
        source_images: images in the training set of the input pipeline; CIFAR has 50,000.
        throughput_batch: images of a batch of a deployed network.
        folder: where a section may keep what it can go on from.
    """

    device: torch.device
    threads: int
    quick: bool = False
    compile: bool = False
    batch_size: int = 128
    seconds: float = 12.0
    rounds: tuple[int, int] = (3, 30)
    shortest: float = 0.03
    score_images: int = 640
    source_images: int = 50_000
    throughput_batch: int = 256
    folder: Path = Path("results/bench")

    @classmethod
    def rough(cls, device: torch.device, threads: int, **others: Any) -> "Settings":
        """For a look at whether everything works; the ratios are rough."""
        return cls(
            device, threads, quick=True, batch_size=32, seconds=0.5, rounds=(2, 3), shortest=0.01, score_images=64,
            source_images=5_000, throughput_batch=64, **others,
        )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One quantity in every round of a comparison, in the rounds' order."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.values, (25, 75))
        return float(low), float(high)

    def __truediv__(self, other: "Measured") -> "Measured":
        """The ratio round by round; both must come from one comparison."""
        return Measured(tuple(mine / theirs for mine, theirs in zip(self.values, other.values, strict=True)))

    def map(self, function: Callable[[float], float]) -> "Measured":
        return Measured(tuple(map(function, self.values)))


def interleave(cases: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, Measured]:
    """Seconds of one call of each case in every round, all cases having the same number of rounds.

    Each case is called once to warm up, and again, unless that took long, to see how often it fits into a measurement.
    Every second round runs in reverse, so that none always follows the same one.
    """
    calls, seconds = {}, {}
    for name, case in cases.items():
        once = _seconds(case, 1, settings.device)
        if once < _LONG:
            once = _seconds(case, 1, settings.device)
        calls[name] = max(1, math.ceil(settings.shortest / max(once, 1e-9)))
        seconds[name] = []
    fewest, most = settings.rounds
    started, done = time.perf_counter(), 0
    while done < fewest or (done < most and (time.perf_counter() - started) * (done + 1) / done < settings.seconds):
        for name in list(cases) if done % 2 == 0 else reversed(cases):
            seconds[name].append(_seconds(cases[name], calls[name], settings.device))
        done += 1
    return {name: Measured(tuple(values)) for name, values in seconds.items()}


def goal(what: str, measured: Measured, limit: float, *, at_least: bool = False, otherwise: str = "") -> str:
    """Whether the median keeps within ``limit``, as a sentence; where it does not, followed by ``otherwise``."""
    is_met = measured.median >= limit if at_least else measured.median <= limit
    bound = "at least" if at_least else "at most"
    text = f"Goal: {what}: {bound} {limit:g}. {'Met' if is_met else 'Missed'}: {measured.median:.3g}."
    return text if is_met or not otherwise else f"{text} {otherwise}"


def seconds_of_one(case: Callable[[], object], device: torch.device) -> float:
    """Seconds of a single call that has not been warmed up, for what is too slow for more."""
    return _seconds(case, 1, device)


def _seconds(case: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        case()
    synchronize(device)
    return (time.perf_counter() - started) / calls


@dataclass
class Table:
    """A section's findings: rows of cells by column, and the sentences that go below."""

    title: str
    columns: Sequence[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, **cells: Any) -> None:
        """Append a row; keys are column names, ``_`` standing for a space."""
        row = {key.replace("_", " "): value for key, value in cells.items()}
        if unknown := row.keys() - set(self.columns):
            raise KeyError(f"table {self.title!r} has no column {sorted(unknown)}")
        self.rows.append(row)

    def to_json(self) -> dict[str, Any]:
        """Plain values; a Measured becomes its median, quartiles and number of rounds."""
        rows = [{key: _plain(value) for key, value in row.items()} for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "notes": self.notes}


def render_text(table: Mapping[str, Any]) -> str:
    """A table as :meth:`Table.to_json` gives it, in aligned columns for the terminal."""
    lines = _cells(table)
    widths = [max(len(line[i]) for line in lines) for i in range(len(table["columns"]))]
    numeric = [_is_numeric(table, column) for column in table["columns"]]
    text = [table["title"], ""]
    for line in lines:
        padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True))
        text.append("  ".join(padded).rstrip())
    text.insert(3, "  ".join("-" * width for width in widths))
    return "\n".join([*text, *([""] if table["notes"] else []), *table["notes"]])


def render_markdown(table: Mapping[str, Any]) -> str:
    """The same as a Markdown table."""
    head, *body = _cells(table)
    rule = ["---:" if _is_numeric(table, column) else "---" for column in table["columns"]]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, rule, *body)]
    return "\n".join([f"### {table['title']}", "", *lines, "", *(f"- {note}" for note in table["notes"])]).strip()


def _plain(value: Any) -> Any:
    if isinstance(value, Measured):
        low, high = value.quartiles
        return {"median": value.median, "quartiles": [low, high], "rounds": len(value.values)}
    return value


def _cells(table: Mapping[str, Any]) -> list[list[str]]:
    return [list(table["columns"]), *([_show(row.get(c)) for c in table["columns"]] for row in table["rows"])]


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        low, high = value["quartiles"]
        spread = f" ({_number(low)}..{_number(high)})" if value["rounds"] > 1 else ""
        return _number(value["median"]) + spread
    return _number(value) if isinstance(value, int | float) else str(value)


def _number(value: float) -> str:
    """Three significant digits without an exponent; whole numbers whole."""
    if isinstance(value, int) or value == 0 or not math.isfinite(value):
        return f"{value:,}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def _is_numeric(table: Mapping[str, Any], column: str) -> bool:
    values = [row.get(column) for row in table["rows"]]
    return all(value is None or isinstance(value, int | float | dict) for value in values)
