"""APBM against each rival: a row a comparison, a matrix a target, and the mean over all targets."""

import pandas as pd

from apbm_core.study.methods import label, ordered
from apbm_core.study.report.frames import noises
from apbm_core.study.report.statistics import (
    ABOVE,
    BELOW,
    PAIRS_FOR_A_VERDICT,
    Comparison,
    design_sees,
    judge,
    mean_noise,
)

_BED = ["model", "dataset", "target"]


def against_rivals(frame: pd.DataFrame, method: str = "apbm") -> pd.DataFrame:
    """``method``'s accuracy minus each rival's, at the same network and target, paired by seed; in points.

    At equal epochs all have the same schedule. ``method``'s equal-time runs are set beside the other equal-time runs,
    and beside the equal-epochs runs of rivals that have none: those the time was measured by. With widths of its own
    (``method@rule``) it is set beside all, too.

    Intervals are from the pooled noise, verdicts are corrected over the rows of one network, target and schedule: see
    :mod:`apbm_core.study.report.statistics`. The time ratio is of the pairs that were timed under equal conditions, and
    NaN without any.

    Args:
        frame: of :func:`apbm_core.study.report.frames.runs_frame`.
        method: whose accuracy is compared.
    """
    known, tables = noises(frame), []
    for key, group in frame[frame["method"] != "dense"].groupby(_BED, observed=True, sort=False):
        for schedule in group["schedule"].unique():
            same = group[group["schedule"] == schedule]
            ours = [name for name in ordered(same["method"]) if name.partition("@")[0] == method]
            others = group[(group["schedule"] == "equal") & ~group["method"].isin(same["method"])]
            beside = pd.concat([same, others]) if schedule == "equal-time" else same
            found = []
            for place, own in enumerate(ours):
                for rival in ordered(beside["method"]):
                    if rival not in ours[: place + 1]:
                        found.append(_pair(same[same["method"] == own], beside[beside["method"] == rival]))
            found = [pair for pair in found if pair is not None]
            if found:
                spreads = [known[key].between(facts["method"], facts.pop("name")) for _, facts in found]
                judged = judge([comparison for comparison, _ in found], spreads).rename(columns={"pairs": "n"})
                bed = pd.DataFrame([dict(zip(_BED, key, strict=True)) | facts for _, facts in found])
                tables.append(pd.concat([bed, judged], axis=1))
    columns = [*_BED, "schedule", "method", "rival", "rival's schedule", "difference", "interval", "n", "p (Holm)"]
    columns += ["verdict", "time ratio", "MACs ratio"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _pair(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[Comparison, dict] | None:
    """What two methods' runs with the same seeds say of each other; None if no seed is in both."""
    both = ours.merge(theirs, on="seed", suffixes=("", " of rival"))
    if both.empty:
        return None
    timed = both[both["timed on"] == both["timed on of rival"]]
    facts = {
        "schedule": both["schedule"].iloc[0],
        "method": both["method"].iloc[0],
        "name": both["method of rival"].iloc[0],
        "rival": label(both["method of rival"].iloc[0]),
        "rival's schedule": both["schedule of rival"].iloc[0],
        "time ratio": (timed["training seconds"] / timed["training seconds of rival"]).mean(),
        "MACs ratio": (both["MACs"] / both["MACs of rival"]).mean(),
    }
    return paired(both), facts


def paired(both: pd.DataFrame) -> Comparison:
    """The comparison of merged runs: columns accuracy and network, and the same with `` of rival``."""
    each = tuple((both["accuracy"] - both["accuracy of rival"]).tolist())
    return Comparison(each, int((both["network"] == both["network of rival"]).sum()))


def over_targets(frame: pd.DataFrame, method: str = "apbm", schedule: str = "equal") -> pd.DataFrame:
    """``method``'s accuracy minus each rival's, averaged over the targets that both ran with the same seeds.

    A row a network, data set and rival; *points* is how many targets. It sees smaller differences than one target does,
    and answers another question: which of the two is better on the whole. Corrected over a network's rows. Of a study
    under way, in which too few seeds have all targets, it takes the targets that enough of them share.
    """
    known, tables = noises(frame), []
    runs = frame[(frame["method"] != "dense") & (frame["schedule"] == schedule)]
    for (model, dataset), group in runs.groupby(["model", "dataset"], observed=True, sort=False):
        names, found, spreads = [], [], []
        ours = group[group["method"] == method]
        for rival in ordered(group["method"]):
            both = ours.merge(group[group["method"] == rival], on=["target", "seed"], suffixes=("", " of rival"))
            if rival == method or both.empty:
                continue
            both["pair"] = both["accuracy"] - both["accuracy of rival"]
            by_seed = _shared_targets(both.pivot(index="seed", columns="target", values="pair"))
            if by_seed.empty:  # no seed has all targets
                continue
            same = (both["network"] == both["network of rival"]).groupby(both["seed"]).any()
            names.append((rival, by_seed.shape[1]))
            found.append(Comparison(tuple(by_seed.mean(axis="columns")), int(same[by_seed.index].sum())))
            spreads.append(
                mean_noise([known[model, dataset, target].between(method, rival) for target in by_seed.columns])
            )
        if found:
            judged = judge(found, spreads).rename(columns={"pairs": "n"})
            rows = [{"model": model, "dataset": dataset, "method": method} for _ in names]
            table = pd.concat([pd.DataFrame(rows), judged], axis=1)
            table.insert(3, "rival", [label(rival) for rival, _ in names])
            table.insert(4, "points", [count for _, count in names])
            tables.append(table)
    columns = ["model", "dataset", "method", "rival", "points", "difference", "interval", "n", "p (Holm)", "verdict"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _shared_targets(pairs: pd.DataFrame) -> pd.DataFrame:
    """The seeds (rows) that have all targets (columns), of as many targets as leave enough seeds for a verdict.

    Which targets are dropped depends on what has run, never on what came of it. If no two targets leave enough seeds,
    it is the seeds that have all.
    """
    by_seeds = pairs.notna().sum().sort_values(ascending=False, kind="stable").index
    for count in range(len(by_seeds), 1, -1):
        whole = pairs[sorted(by_seeds[:count])].dropna(axis="index")
        if len(whole) >= PAIRS_FOR_A_VERDICT:
            return whole
    return pairs.dropna(axis="index")


def matrix(table: pd.DataFrame) -> pd.DataFrame:
    """One target's rows of :func:`against_rivals` as a matrix: a row a rival, a column for each of our runs.

    A cell says the difference with its interval, what the correction makes of it, and the time ratio:
    ``+1.20 ± 0.50 above, 0.45 x time``.
    """
    words = {"equal": "equal epochs", "equal-time": "equal time", "published": "published schedule"}
    cells = table.assign(
        ours=[f"{label(row.method)}, {words[row.schedule]}" for row in table.itertuples()],
        cell=[_cell(*values) for values in table[["difference", "interval", "n", "verdict", "time ratio"]].to_numpy()],
    )
    rivals, ours = list(dict.fromkeys(cells["rival"])), list(dict.fromkeys(cells["ours"]))
    wide = cells.pivot(index="rival", columns="ours", values="cell").reindex(index=rivals, columns=ours)
    return wide.fillna("").rename_axis(columns=None).reset_index()


def _cell(difference: float, interval: float, n: int, verdict: str, time_ratio: float) -> str:
    words = f"{difference:+.2f}" + ("" if pd.isna(interval) else f" ± {interval:.2f}")
    words += f" (n = {n})" if n < PAIRS_FOR_A_VERDICT else f" {verdict}"
    return words if pd.isna(time_ratio) else f"{words}, {time_ratio:.2f} x time"


CELL_COLOURS = {ABOVE: "#D7EFE6", BELOW: "#F7DDCC"}
"""Behind a cell of :func:`matrix` that has a verdict: pale green and pale vermilion, which the words repeat."""


def cell_style(cell: str) -> str:
    """The CSS of a cell of :func:`matrix`, for ``Styler.map``."""
    found = [colour for word, colour in CELL_COLOURS.items() if f" {word}" in cell]
    return f"background-color: {found[0]}" if found else ""


def power_notes(frame: pd.DataFrame, table: pd.DataFrame) -> list[tuple[tuple[str, str, float], str]]:
    """For each network, data set and target of :func:`against_rivals`' rows: what difference the design can see."""
    known, equal, notes = noises(frame), table[table["schedule"] == "equal"], []
    for key, rows in equal.groupby(_BED, sort=False):
        words = design_sees(known[key].common, int(rows["n"].max()), len(rows))
        if own := known[key].own:
            named = ", ".join(f"{label(name)} by sd {noise.sd:.2f} ({noise.df})" for name, noise in own.items())
            words += f" Far more than the others, and judged by itself, spreads {named}."
        notes.append((key, words))
    return notes
