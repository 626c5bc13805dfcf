"""What the recorded runs say, in three sentences and two drawings that need no script.

Every number is computed from the records each time the front page is written.
"""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from apbm_core.study.ablation import design
from apbm_core.study.ablation import tables as ablation_tables
from apbm_core.study.methods import get_method, label
from apbm_core.study.networks.models import get_network
from apbm_core.study.records import RunRecord
from apbm_core.study.report.frames import label_model, points, runs_frame
from apbm_core.study.report.statistics import ABOVE, BELOW
from apbm_core.study.report.style import colour

_RIVALS = ("hrank", "polarization", "swp")
_WORDS = {ABOVE: "helps", BELOW: "hurts"}


def sentences(
    records: Mapping[str, Sequence[RunRecord]], pairs: pd.DataFrame, headline_pairs: pd.DataFrame | None = None
) -> list[str]:
    """One sentence for each network of the profile that was trained longest, and one for the ablation.

    Args:
        records: the records of each profile, by its name.
        pairs: the ablation's ingredients, of :func:`ingredients`.
        headline_pairs: the same of the bed with the paper's headline network.
    """
    said = []
    first = headline(records)
    if first:
        table = points(runs_frame(records[first]))
        asked = table[table["target"] > 0][["target", "model"]].drop_duplicates().sort_values("target", ascending=False)
        for target, model in asked.itertuples(index=False):
            said += _of_network(table[table["model"] == model], model, target, _form(records[first], model))
    return _of_passing(headline_pairs) + said + _of_ablation(pairs)


def ingredients(results: Path, bed: str = "resnet20") -> pd.DataFrame:
    """What a bed of the ablation, recorded in ``results``, says of each ingredient; empty without records."""
    return ablation_tables.ingredients(design.recorded(results / design.FOLDER, bed))


def headline(records: Mapping[str, Sequence[RunRecord]]) -> str:
    """The profile whose runs, judged by the test images, took longest in all; empty without any."""
    seconds = {
        name: sum(record.seconds for record in runs if record.test_accuracy is not None)
        for name, runs in records.items()
        if name != design.FOLDER
    }
    return max(seconds, key=seconds.get) if any(seconds.values()) else ""


def _form(records: Sequence[RunRecord], model: str) -> str:
    """Says so if APBM ran in a form that is not the one it has by default in such a network."""
    ran = [
        record.config.options for record in records if (record.config.method, record.config.model) == ("apbm", model)
    ]
    usual = get_method("apbm").Options().for_network(get_network(model)).passing
    return " (fusion alone; its input was not passed on)" if usual and not any(o.get("passing") for o in ran) else ""


def _of_network(table: pd.DataFrame, model: str, target: float, form: str) -> list[str]:
    at = table[table["target"] == target]
    equal = at[at["schedule"] == "equal"].set_index("method")["accuracy"]
    if "apbm" not in equal.index or "scratch" not in equal.index:
        return []
    row = at[(at["schedule"] == "equal") & (at["method"] == "apbm")].iloc[0]
    seeds = f"{row['n']:.0f} seed{'s' if row['n'] > 1 else ''}"
    words = (
        f"<b>{label_model(model)}, {target:.4g} % of its parameters removed</b> ({row['epochs']:.0f} epochs, {seeds}): "
        f"APBM{form} reaches {equal['apbm']:.2f} %, the same slim network trained from scratch {equal['scratch']:.2f} %"
    )
    rivals = equal[[name for name in _RIVALS if name in equal.index]]
    if len(rivals):
        rest = ", ".join(f"{label(name)} {value:.2f} %" for name, value in rivals.sort_values(ascending=False).items())
        words += f"; the paper's rivals: {rest}"
    dense = table[(table["target"] == 0) & (table["schedule"] == "equal")]["accuracy"]
    words += f"; the dense network {dense.iloc[0]:.2f} %." if len(dense) else "."
    longer = at[at["schedule"] == "equal-time"].set_index("method")["accuracy"]
    if {"apbm", "scratch"} <= set(longer.index):
        words += f" In L1's training time: APBM {longer['apbm']:.2f} %, slim from scratch {longer['scratch']:.2f} %."
    return [words]


def _of_passing(pairs: pd.DataFrame | None) -> list[str]:
    named = {} if pairs is None or pairs.empty else pairs.set_index(["with", "without"])
    gain, fusing = ("passing-fused", "scratch"), ("passing-fused", "passing")
    if not len(named) or gain not in named.index or fusing not in named.index:
        return []
    rows = [named.loc[pair] for pair in (gain, fusing)]
    said = [f"{row['difference']:+.2f} ± {row['interval of difference']:.2f}" for row in rows]
    of_passing, of_fusing = (_WORDS.get(row["verdict"], "has not been shown to help") for row in rows)
    return [
        f"<b>Passing the input on {of_passing}; fusing {of_fusing} beside it.</b> VGG16, held-out images, "
        f"{rows[0]['pairs']:.0f} seeds: APBM whose filters pass their input on against slim from scratch "
        f"{said[0]} points; the same with fusion against without {said[1]} points."
    ]


def _of_ablation(pairs: pd.DataFrame) -> list[str]:
    if pairs.empty:
        return []
    helps, hurts = (list(pairs[pairs["verdict"] == word]["ingredient"]) for word in ("above", "below"))
    words = (
        f"<b>Of {len(pairs)} comparisons of one ingredient each</b>, on ResNet20, {len(helps)} are shown to help after "
        f"the correction for so many"
    )
    words += f" ({html.escape('; '.join(helps))})" if helps else ""
    words += f" and {len(hurts)} to hurt" + (f" ({html.escape('; '.join(hurts))})." if hurts else ".")
    named = pairs.set_index(["with", "without"])
    for pair, what in (
        (("base", "no-fusion"), "Mixing the other filters in"),
        (("bank-lr-2", "scratch-lr-2"), "APBM against slim from scratch, both learning twice as fast"),
    ):
        if pair in named.index:
            row = named.loc[pair]
            half = row["interval of difference"]
            interval = "" if math.isnan(half) else f" ± {half:.2f}"
            words += f" {what}: {row['difference']:+.2f}{interval} points."
    return [words]


def drawing(records: Sequence[RunRecord]) -> tuple[str, str]:
    """The methods' accuracies at equal epochs, a panel a network and target, dense dashed; and its caption."""
    table = points(runs_frame(records))
    panels = []
    for (model, target), group in table[(table["target"] > 0) & (table["schedule"] == "equal")].groupby(
        ["model", "target"], sort=False
    ):
        dense = table[(table["model"] == model) & (table["target"] == 0)]["accuracy"]
        panels.append((model, target, group.sort_values("accuracy", ascending=False), dense.max()))
    panels.sort(key=lambda panel: -panel[1])
    height, parts = 0, []
    for model, target, rows, dense in panels:
        values = [*rows["accuracy"], *([] if math.isnan(dense) else [dense])]
        scale = _scale(min(values), max(values), 232, 385)
        heading = f"{label_model(model)}, {target:.4g} % removed"
        parts.append(f'<text x="2" y="{height + 16}" font-weight="600">{heading}</text>')
        top = height + 24
        if not math.isnan(dense):
            x = scale(dense)
            parts.append(
                f'<path d="M{x:.1f} {top}V{top + 20 * len(rows)}" class="axis" stroke-dasharray="4 3"/>'
                f'<text x="428" y="{height + 16}" text-anchor="end" class="faint">dense {dense:.2f}</text>'
            )
        for place, row in enumerate(rows.itertuples()):
            y = top + 20 * place + 10
            parts.append(
                f'<path d="M232 {y}H385" class="grid"/><text x="226" y="{y + 4}" text-anchor="end">'
                f'{html.escape(label(row.method))}</text><circle cx="{scale(row.accuracy):.1f}" cy="{y}" r="5" '
                f'fill="{on_paper(colour(row.method))}"/><text x="428" y="{y + 4}" text-anchor="end">'
                f"{row.accuracy:.2f}</text>"
            )
        height = top + 20 * len(rows) + 12
    leaders = [(model, rows.iloc[0]) for model, _, rows, _ in panels]
    words = "; ".join(f"{label_model(m)}: {label(r['method'])} leads with {r['accuracy']:.2f} %" for m, r in leaders)
    return _svg(430, height, parts, words), words


def forest(pairs: pd.DataFrame) -> tuple[str, str]:
    """The ablation's ingredients, a row each: difference with its 95 % interval, the seeds as small dots: SVG."""
    if pairs.empty:
        return "", ""
    pairs = pairs.sort_values("difference", ascending=False)
    low, high = (pick(pairs["each"].map(pick)) for pick in (min, max))
    half = pairs["interval of difference"].fillna(0)
    low, high = min(low, (pairs["difference"] - half).min()), max(high, (pairs["difference"] + half).max())
    scale = _scale(low, high, 4, 426)
    height = 30 * len(pairs) + 24
    parts = [f'<path d="M{scale(0):.1f} 4V{height - 20}" class="axis"/>']
    for place, row in enumerate(pairs.itertuples()):
        y = 30 * place + 25
        ink = {"above": "#009e73", "below": "#d55e00"}.get(row.verdict, "var(--faint)")
        width = pairs["interval of difference"].iloc[place]
        ends = [] if math.isnan(width) else [scale(row.difference - width), scale(row.difference + width)]
        bar = f'<path d="M{ends[0]:.1f} {y}H{ends[1]:.1f}" stroke="{ink}" stroke-width="2"/>' if ends else ""
        dots = "".join(f'<circle cx="{scale(v):.1f}" cy="{y}" r="2.4" fill="{ink}" opacity=".45"/>' for v in row.each)
        parts.append(
            f'<text x="2" y="{y - 9}">{html.escape(row.ingredient)}</text><text x="428" y="{y - 9}" text-anchor="end" '
            f'class="faint">{row.difference:+.2f}</text>{bar}{dots}'
            f'<circle cx="{scale(row.difference):.1f}" cy="{y}" r="4.5" fill="{ink}"/>'
        )
    for tick in range(math.ceil(low), math.floor(high) + 1):
        parts.append(f'<text x="{scale(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:+d}</text>')
    helps, hurts = ((pairs["verdict"] == word).sum() for word in ("above", "below"))
    words = (
        f"{len(pairs)} ingredients, points of held-out accuracy with it minus without it: after Holm's correction "
        f"{helps} are above zero (green) and {hurts} below (orange); bars are 95 % intervals of one comparison, dots "
        "the seeds"
    )
    return _svg(430, height, parts, words), words


def on_paper(ink: str) -> str:
    """A colour that can be seen on dark paper as well: the two darkest follow the page's ink."""
    return {"#000000": "var(--ink)", "#444444": "var(--faint)"}.get(ink.lower(), ink)


def _scale(low: float, high: float, left: float, right: float):
    margin = 0.08 * (high - low) or 1
    low, high = low - margin, high + margin
    return lambda value: left + (value - low) / (high - low) * (right - left)


def _svg(width: int, height: int, parts: Sequence[str], words: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(words, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
