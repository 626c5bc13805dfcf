"""Numbers in prose, each tied to the record it comes from.

A comment behind a number says where it is from, and whoever reads the page does not see it::

    APBM reaches 86.19 %<!--= run("cpu", "vgg16", "apbm").accuracy -->, 0.26 points above it
    | SWP | 88.83 % | 73.5 % | 40.8 min |<!--= x = run("cpu", "vgg16", "swp"); x.accuracy, x.macs_removed, x.minutes -->

It holds one or more expressions, for as many numbers before it, in their order. Differences are written as such:
``run(...).accuracy - run(...).accuracy``. The value is compared at the precision that the text shows. Names:

- ``run(profile, model, method, **config)``: the one record in ``results/<profile>/runs`` of this configuration (by
  default CIFAR-10, the network's only target, seed 0, equal epochs and uniform widths), with ``accuracy``, ``drop``
  (points below dense), ``parameters_removed``, ``macs_removed``, ``minutes``, ``seconds``, ``epochs``, ``parameters``,
  ``macs``;
- ``cell(path, column, **where)``: one cell of a table, ``results/<path>.csv``; ``largest(path, column)`` of its
  column, and ``sd(path, column)``, the spread of one of the two runs whose differences the column holds;
- what the caller adds, such as the ablation's pairs of variants.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from apbm_core.errors import ApbmError, ConfigError
from apbm_core.study.records import ResultsFolder, RunRecord

_COMMENT = re.compile(r"<!--=(.*?)-->", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[+\-\N{MINUS SIGN}]?\d[\d,]*(?:\.\d+)?(?![\w]|\.\d)")
_CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)", re.DOTALL)
PAPERS = frozenset({92.74, 72.91, 48.84, 44.18})
"""Shares that the paper's abstract reports, in percent; they need no record."""


@dataclass(frozen=True)
class Run:
    """A record's numbers in the units of the prose."""

    record: RunRecord
    dense: RunRecord | None

    def __getattr__(self, name: str) -> Any:
        record = self.record
        accuracy = record.test_accuracy if record.test_accuracy is not None else record.val_accuracy
        known = {
            "accuracy": 100 * accuracy,
            "parameters_removed": 100 * record.parameters_removed,
            "macs_removed": 100 * record.macs_removed,
            "seconds": record.seconds,
            "minutes": record.seconds / 60,
            "epochs": record.config.epochs,
            "parameters": record.parameters,
            "macs": record.macs,
        }
        if name == "drop" and self.dense is not None:
            return 100 * (self.dense.test_accuracy - accuracy)
        if name not in known:
            raise AttributeError(f"a run has no {name!r}; it has drop, {', '.join(known)}")
        return known[name]


@dataclass(frozen=True)
class Source:
    """Where the numbers are: the folder ``results``."""

    results: Path

    def run(self, profile: str, model: str, method: str, **config: Any) -> Run:
        """The record of this configuration. Raises ConfigError unless there is exactly one."""
        usual = {"dataset": "cifar10", "seed": 0, "schedule": "equal", "widths": "uniform"}
        wanted = usual | config | {"model": model, "method": method}
        records = _records(self.results / profile)

        def matching(**wanted: Any) -> list[RunRecord]:
            return [r for r in records if all(getattr(r.config, key) == value for key, value in wanted.items())]

        found = matching(**wanted)
        if len(found) != 1:
            raise ConfigError(f"{len(found)} records of {profile} are of {wanted}; say more of the configuration.")
        dense = matching(model=model, method="dense", seed=wanted["seed"], dataset=wanted["dataset"])
        return Run(found[0], dense[0] if len(dense) == 1 else None)

    def cell(self, path: str, column: str, **where: Any) -> float:
        """One cell of ``results/<path>.csv``. Raises ConfigError unless there is exactly one row of these values."""
        table = pd.read_csv(self.results / f"{path}.csv")
        for key, value in where.items():
            table = table[table[key] == value]
        if len(table) != 1:
            raise ConfigError(f"{len(table)} rows of {path} have {where}; name values that one row has.")
        return table[column].iloc[0]

    def largest(self, path: str, column: str) -> float:
        """The largest magnitude in a column of a table."""
        return pd.read_csv(self.results / f"{path}.csv")[column].abs().max()

    def sd(self, path: str, column: str) -> float:
        """The spread of one run, from a column of differences of two: its root mean square over the root of two."""
        return (pd.read_csv(self.results / f"{path}.csv")[column] ** 2).mean() ** 0.5 / 2**0.5


@cache
def _records(folder: Path) -> tuple[RunRecord, ...]:
    return tuple(ResultsFolder(folder).read_all())


@dataclass(frozen=True)
class Quote:
    """A number of the prose: what it says, and what its source says, if it names one."""

    line: int
    text: str
    source: str = ""
    value: float | None = None
    error: str = ""

    @property
    def problem(self) -> str:
        """What is wrong with it, in a sentence; empty if nothing is."""
        where = f"line {self.line}: {self.text}"
        if self.error:
            return f"{where} cannot be checked: {self.error}"
        if self.value is None:
            return f"{where} names no source; put <!--= ... --> behind it"
        said = float(self.text.replace(",", "").replace("\N{MINUS SIGN}", "-"))
        digits = len(self.text.partition(".")[2])
        if abs(said - self.value) > 0.5001 * 10.0**-digits:
            return f"{where}, but {self.source} is {self.value:.{digits + 2}f}"
        return ""


def quotes(text: str, results: str | Path, **more: Callable[..., Any]) -> Iterator[Quote]:
    """Every number of a Markdown text that has a source, and those with decimals that have none.

    Numbers in code, in links' addresses, and the shares of the paper's abstract (:data:`PAPERS`) need none.

    Args:
        text: Markdown.
        results: the folder that the sources are in.
        more: further functions that a comment may call, by name.
    """
    source, start = Source(Path(results)), 0
    names = {name: getattr(source, name) for name in ("run", "cell", "largest", "sd")} | more
    for comment in [*_COMMENT.finditer(text), None]:
        end = comment.start() if comment else len(text)
        numbers = _numbers(text, start, end)
        values, error = ([], "") if comment is None else _evaluated(comment[1], names)
        tied = len(values) or (1 if error else 0)
        loose, bound = numbers[: len(numbers) - tied], numbers[len(numbers) - tied :]
        for place, number in loose:
            if "." in number and abs(float(number.replace(",", "").replace("\N{MINUS SIGN}", "-"))) not in PAPERS:
                yield Quote(_line(text, place), number)
        if comment:
            if len(bound) < tied:
                few = f"there are {len(numbers)} numbers before it, and {tied} values"
                yield Quote(_line(text, end), comment[1].strip(), error=few)
            for (place, number), value in zip(bound, values or [None], strict=False):
                yield Quote(_line(text, place), number, comment[1].strip(), value, error)
            start = comment.end()


def _numbers(text: str, start: int, end: int) -> list[tuple[int, str]]:
    """The numbers between two places, outside of code and addresses: (place, as written)."""
    part = _CODE.sub(lambda match: " " * len(match[0]), text)[start:end]
    return [(start + match.start(), match[0].rstrip(",")) for match in _NUMBER.finditer(part)]


def _evaluated(source: str, names: dict[str, Any]) -> tuple[list[float], str]:
    """The values of a comment's expressions, and what went wrong."""
    scope, builtins = dict(names), {"__builtins__": {"abs": abs, "int": int, "max": max, "min": min}}
    try:
        *settings, last = ast.parse(source.strip()).body
        exec(compile(ast.Module(settings, []), "the comment", "exec"), builtins | scope, scope)
        value = eval(compile(ast.Expression(last.value), "the comment", "eval"), builtins | scope, scope)
    except (ApbmError, SyntaxError, AttributeError, NameError, KeyError, TypeError, OSError, ValueError) as error:
        return [], f"{type(error).__name__}: {error}"
    return [float(each) for each in (value if isinstance(value, tuple) else (value,))], ""


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1
