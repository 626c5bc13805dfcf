"""A notebook's page: the study it is about, and figures and tables that are shown and stored.

page = open_page("02_train", profile, results, changes)
records = page.run(page.study.configs())
page.table(tables.summary(records), "from_scratch")          results/<profile>/tables/02_from_scratch.csv
page.figure(curves.training_curves(records), "curves")       results/<profile>/figures/02_curves.png
"""

import html
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, Image, display
from matplotlib.figure import Figure

from apbm_core.errors import ConfigError
from apbm_core.files import write_atomically
from apbm_core.study.grid.grid import RECORDS_ONLY, Study
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.grid.profiles import (
    DEFAULT,
    FOLDER,
    GIVEN,
    Effective,
    choices,
    lay_over,
    load_profile,
    repository,
)
from apbm_core.study.grid.run import environment
from apbm_core.study.records import OWN, PUBLISHED_RESULTS, RunConfig, RunRecord
from apbm_core.study.report import frames, kernel, style, tables

_MOST_NAMED = 10  # more ids than that are read by nobody


def open_page(
    name: str,
    profile: str,
    results: str | Path = OWN,
    changes: Mapping[str, Any] | None = None,
    *,
    shows_runs: bool = True,
    reads_only: bool = False,
    takes: Sequence[str] | None = None,
) -> "Page":
    """The page of a notebook: the profile laid over the defaults, then ``changes``; checked at once, and shown.

    What papermill was given by name (``papermill 02_train.ipynb out.ipynb -p epochs 3``) counts as a change, too.

    Args:
        name: the notebook's, like "02_train"; its figures and tables begin with the number.
        profile: a file of notebooks/profiles, without its ending.
        results: everything goes to the folder ``profile`` in it; a relative one is the repository's.
        changes: parameters that differ from the profile's, by name.
        shows_runs: False for a page of examples, which is complete without any record.
        reads_only: True for a page that trains nothing unless a reproduction (``make reproduce``) asks for it.
        takes: the parameters that may be changed, where the page does not heed all of them.

    Raises:
        ConfigError: naming each value that is unknown, of the wrong type or impossible.
    """
    kernel.show_errors_briefly()
    root = repository()
    if root is None:
        raise ConfigError(f"there is no folder {FOLDER} here or above, and none with apbm_core; start in a checkout.")
    given = _changes(changes) | kernel.injected_by_papermill()
    if takes is not None:
        for other in given:
            if other not in takes:
                raise ConfigError(f"{name} does not take the parameter {other!r}{choices(other, takes)}")
    effective = lay_over(load_profile(root, profile), given)
    style.use_style()
    records_only = os.environ.get(RECORDS_ONLY) != "0" if reads_only else None
    study = Study(effective.parameters, from_root(results) / profile, records_only, shows_runs)
    page = Page(name, study, effective)
    page.describe()
    return page


def from_root(folder: str | Path) -> Path:
    """A folder of the repository, whose root is the nearest folder that holds ``notebooks/profiles``.

    `make` starts a notebook there and JupyterLab where the notebook lies, in ``notebooks/`` or ``results/<profile>/``;
    a relative folder means the same in all of them. Outside of the repository it is taken as it is.
    """
    for depth, place in enumerate((Path.cwd(), *Path.cwd().parents)):
        if (place / FOLDER).is_dir():
            return Path(*[".."] * depth, folder)
    return Path(folder)


class Page:
    """A study with a name for its figures and tables; see the module's first lines."""

    def __init__(self, name: str, study: Study, effective: Effective | None = None):
        self.name, self.study, self.effective = name, study, effective

    @property
    def parameters(self) -> StudyParameters:
        """The checked parameters."""
        return self.study.parameters

    @cached_property
    def folder(self) -> Path:
        """Where figures and tables go."""
        return self.study.results.path

    @property
    def published(self) -> Path:
        """Where the committed records of this profile are, if there are any."""
        return from_root(PUBLISHED_RESULTS) / self.folder.name

    def recorded(self) -> Path:
        """Where records are to be read: this page's folder, or, before it holds any, the published one."""
        if not any(self.folder.glob("runs/*.json")) and any(self.published.glob("runs/*.json")):
            print(f"{self.folder.as_posix()} holds no records yet; these are the published ones.")
            return self.published
        return self.folder

    def run(self, configs: Sequence[RunConfig] | None = None) -> list[RunRecord]:
        """The records of ``configs``, by default of everything; what is not recorded is run first (Study.run)."""
        return self.study.run(configs)

    def describe(self) -> None:
        """Show the banner, if there is one; every parameter and its origin; the versions, the machine and the data;
        and which runs lack a record."""
        if self.study.banner:
            display(HTML(f'<p class="banner" style="color:#d1495b;font-weight:bold">{self.study.banner}</p>'))
        facts = environment(self.study.device)
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines = [
            f"Python {facts['python']}, {versions}",
            f"{facts['device']}, {facts['threads']} threads; source {facts['commit'][:12]}",
            self.study.source,
        ]
        display(_Opening(self.effective, list(filter(None, lines))))
        if self.study.missing:
            print(f"not recorded yet: {_named(self.study.missing)}")

    def table(self, table: pd.DataFrame, name: str = "", caption: str = "") -> None:
        """Show a table, and store it as ``tables/<number>_<name>.csv`` if it has a name."""
        if name:
            path = self.folder / "tables" / f"{self._stem(name)}.csv"
            write_atomically(path, table.to_csv(index=False, float_format="%.6g"))
        if table.empty:
            print("None of what was asked for belongs in this table.")
        display(tables.styled(table, self._stem(name or "table"), caption))

    def figure(self, figure: Figure, name: str) -> None:
        """Store a figure as ``figures/<number>_<name>.png``, show that file with its titles as the alternative text,
        and close it."""
        alternative = _titles(figure)
        style.save(figure, self._stem(name), self.folder, self.study.banner, alternative)
        plt.close(figure)
        picture = (self.folder / "figures" / f"{self._stem(name)}.png").read_bytes()
        display(Image(data=picture, format="png", alt=alternative))

    def beside_published(self, records: Sequence[RunRecord]) -> None:
        """Show each run beside the published record of the same run; a sentence where there is none."""
        if self.folder.resolve() == self.published.resolve():
            print("These are the published records themselves.")
        elif (table := frames.beside_published(records, self.published)).empty:
            print(f"{self.published.as_posix()} holds no record of the same run.")
        else:
            self.table(table)

    def say(self, sentences: Iterable[str]) -> None:
        """Print sentences, a line each."""
        for sentence in sentences:
            print(sentence)

    def _stem(self, name: str) -> str:
        return f"{self.name[:2]}_{name}"


class _Opening:
    """The effective parameters, with the machine's facts, folded away under a line that says what was changed."""

    def __init__(self, effective: Effective | None, facts: Sequence[str]):
        self.facts, self.rows = facts, []
        if effective is not None:
            values = effective.parameters.model_dump(mode="json")
            self.rows = [(name, values[name], origin) for name, origin in effective.origins.items()]
        order = {GIVEN: 0, DEFAULT: 2}
        self.rows.sort(key=lambda row: order.get(row[2], 1))

    def __repr__(self) -> str:
        said = [f"{name} = {value!r}  ({origin})" for name, value, origin in self.rows if origin != DEFAULT]
        return "\n".join([*said, *self.facts])

    def _repr_html_(self) -> str:
        given = [f"{name} = {value!r}" for name, value, origin in self.rows if origin == GIVEN]
        head = f"{GIVEN}: {', '.join(given)}" if given else "all as the profile says, or by default"
        rows = "".join(
            f"<tr><td>{name}</td><td><code>{html.escape(repr(value))}</code></td><td>{html.escape(origin)}</td></tr>"
            for name, value, origin in self.rows
        )
        facts = "".join(f"<p>{html.escape(fact)}</p>" for fact in self.facts)
        return (
            f'<details class="parameters"><summary>{len(self.rows)} parameters; {html.escape(head)}</summary>{facts}'
            f"<table><thead><tr><th>parameter</th><th>value</th><th>from</th></tr></thead><tbody>{rows}</tbody></table>"
            "</details>"
        )


def _changes(changes: Mapping[str, Any] | None) -> dict[str, Any]:
    if changes is None:
        return {}
    if not isinstance(changes, Mapping) or not all(isinstance(name, str) for name in changes):
        raise ConfigError(f"changes must map parameter names to values, like {{'epochs': 6}}; they are {changes!r}.")
    return dict(changes)


def _titles(figure: Figure) -> str:
    """What a figure's titles say, in the order of its panels."""
    panels = [figure, *figure.subfigs]
    said = [panel.get_suptitle() for panel in panels]
    said += [axis.get_title(loc=place) for axis in figure.axes for place in ("left", "center")]
    words = [" ".join(text.split()) for text in said if text.strip()]
    return ". ".join(dict.fromkeys(words)) or "a figure without a title"


def _named(configs: Sequence[RunConfig]) -> str:
    """Runs by their ids; many of them as numbers of each network, data set and seed."""
    if len(configs) <= _MOST_NAMED:
        return ", ".join(config.id for config in configs)
    counts = Counter(
        f"{frames.label_model(config.model)} on {frames.label_dataset(config.dataset)}, seed {config.seed}"
        for config in configs
    )
    return "; ".join(f"{count} runs of {name}" for name, count in counts.items())
