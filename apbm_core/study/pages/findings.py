"""What the recorded runs say, in a few sentences; every number is computed from the records when a page is written."""

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
from apbm_core.study.report.frames import (
    AFTER_CUT,
    BED,
    beds,
    label_dataset,
    label_model,
    of_bed,
    of_shared_seeds,
    points,
    runs_frame,
)
from apbm_core.study.report.rivals import against_rivals, over_targets
from apbm_core.study.report.statistics import ABOVE, BELOW, PAIRS_FOR_A_VERDICT
from apbm_core.study.report.trained_start import BY_RESPONSES, CONTROL, OURS

_RIVALS = ("hrank", "polarization", "swp")
_A_CURVE = 3  # targets, at least
_WORDS = {ABOVE: "helps", BELOW: "hurts"}


def sentences(
    records: Mapping[str, Sequence[RunRecord]], pairs: pd.DataFrame, headline_pairs: pd.DataFrame | None = None
) -> list[str]:
    """What passing the input on does; each network's curve, or what the profile that was trained longest says of it;
    and the ablation.

    Args:
        records: the records of each profile, by its name.
        pairs: the ablation's ingredients, of :func:`ingredients`.
        headline_pairs: the same of the bed with the paper's headline network.
    """
    said, drawn = [], []
    if profile := curves(records):
        frame = runs_frame(_judged(records[profile]))
        duels, means = against_rivals(frame), over_targets(frame)
        with_a_curve = dict(curve_points(records[profile]))
        for bed, table in points(of_shared_seeds(frame)).groupby(BED, sort=False):
            of_both = of_bed(means, *bed), of_bed(duels, *bed)
            if bed in with_a_curve or (of_both[0]["n"] >= PAIRS_FOR_A_VERDICT).any():
                said.append(_of_curve(*of_both, with_a_curve.get(bed, table), *bed, profile))
                drawn.append(bed)
    if first := headline(records):
        table = points(runs_frame(records[first]))
        asked = table[table["target"] > 0][["target", *BED]].drop_duplicates().sort_values("target", ascending=False)
        names = {(model, dataset): words for model, dataset, words in beds(table)}
        for target, *bed in asked.itertuples(index=False):
            if tuple(bed) not in drawn:
                said += _of_network(of_bed(table, *bed), names[tuple(bed)], target, _form(records[first], bed[0]))
    return _of_passing(headline_pairs) + _of_trained(records) + said + _of_ablation(pairs)


def ingredients(results: Path, bed: str = "resnet20") -> pd.DataFrame:
    """What a bed of the ablation, recorded in ``results``, says of each ingredient; empty without records."""
    return ablation_tables.ingredients(design.recorded(results / design.FOLDER, bed))


def headline(records: Mapping[str, Sequence[RunRecord]]) -> str:
    """The profile whose runs, judged by the test images, were longest, a run's epochs times the network's size; empty
    without any."""
    longest = {
        name: max(record.config.epochs * record.dense_macs for record in runs if record.test_accuracy is not None)
        for name, runs in records.items()
        if any(record.test_accuracy is not None for record in runs)
    }
    return max(longest, key=longest.get) if longest else ""


def curves(records: Mapping[str, Sequence[RunRecord]]) -> str:
    """The profile in which APBM and slim from scratch were run at most targets, three at least; empty without any."""
    count = {
        name: max((table["target"].nunique() for _, table in curve_points(runs)), default=0)
        for name, runs in records.items()
    }
    return max(count, key=count.get) if any(count.values()) else ""


def curve_points(records: Sequence[RunRecord]) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """For each (network, data set) with a curve its points at equal epochs, judged by the test images, at the targets
    that APBM and slim from scratch share, three at least, and from the seeds that all methods have there."""
    judged, found = _judged(records), []
    if not judged:
        return []
    for bed, table in points(of_shared_seeds(runs_frame(judged))).groupby(["model", "dataset"], sort=False):
        shared = set(table[table["method"] == "apbm"]["target"]) & set(table[table["method"] == "scratch"]["target"])
        if len(shared) >= _A_CURVE:
            found.append((bed, table[table["target"].isin(shared | {0.0})]))
    return found


def _judged(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs at equal epochs that the test images judged."""
    return [r for r in records if r.test_accuracy is not None and r.config.schedule == "equal"]


def _form(records: Sequence[RunRecord], model: str) -> str:
    """Says so if APBM ran in a form that is not the one it has by default in such a network."""
    ran = [
        record.config.options for record in records if (record.config.method, record.config.model) == ("apbm", model)
    ]
    usual = get_method("apbm").Options().for_network(get_network(model)).passing
    return " (fusion alone; its input was not passed on)" if usual and not any(o.get("passing") for o in ran) else ""


def _of_trained(records: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """What fusing once leaves of a network that was trained already, beside the same cut without it."""
    said = []
    for runs in records.values():
        table = points(of_shared_seeds(runs_frame([record for record in runs if record.notes.get("after_cut")])))
        for bed, group in table.groupby(BED, sort=False):
            parts, seeds = [], set()
            for target, there in group.groupby("target"):
                there = there.set_index(there["method"].astype(str))
                if not {OURS, CONTROL} <= set(there.index):
                    continue
                shown = [name for name in (BY_RESPONSES, OURS, CONTROL) if name in there.index]
                seeds |= set(there.loc[shown, "n"])
                known, tuned = (
                    "; ".join(f"{label(name)} {there[column][name]:.2f}" for name in shown)
                    for column in (AFTER_CUT, "accuracy")
                )
                parts.append(f"with {target:.4g}&nbsp;% removed, right after: {known}; fine-tuned: {tuned}")
            if parts:
                several = _counted(int(min(seeds)), "seed")
                where = f"{label_model(bed[0])}, {label_dataset(bed[1])}, held-out images, {several}"
                said.append(f"<b>A network that is trained already</b> ({where}), % accuracy {'. '.join(parts)}.")
    return said


def _of_curve(
    means: pd.DataFrame, pairs: pd.DataFrame, table: pd.DataFrame, model: str, dataset: str, profile: str
) -> str:
    """APBM's differences to slim from scratch, its other controls and the rivals along a curve: with an interval
    and a verdict where seeds allow it, else with their range; of the bed's :func:`over_targets` and
    :func:`against_rivals`."""
    rows = table[table["method"] == "apbm"]
    targets, epochs, said = rows["target"], rows["epochs"].iloc[0], []
    for rival in ("scratch", "passing", "dirac", *_RIVALS):
        for mean in means[means["rival"] == label(rival)].itertuples():
            facts = [_counted(mean.points, "target"), _counted(mean.n, "seed")]
            if mean.n >= PAIRS_FOR_A_VERDICT:
                difference = f"{mean.difference:+.2f} ± {mean.interval:.2f}"
                facts.append(mean.verdict)
            else:
                each = pairs[(pairs["method"] == "apbm") & (pairs["rival"] == label(rival))]["difference"]
                difference = f"{mean.difference:+.2f}"
                facts += [f"{each.min():+.2f} to {each.max():+.2f}"] if len(each) > 1 else []
            said.append(f"{label(rival)} {difference} ({', '.join(facts)})")
    ends = list(dict.fromkeys(f"{target:.4g}" for target in (targets.min(), targets.max())))
    average = ", on average over targets," if len(ends) > 1 else ""
    return (
        f"<b>{label_model(model)} on {label_dataset(dataset)}, {' to '.join(ends)} % of its parameters removed</b> "
        f"({profile}, {epochs:.0f} epochs): APBM is so many points ahead{average} of "
        f"{'; '.join(said)}."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _of_network(table: pd.DataFrame, name: str, target: float, form: str) -> list[str]:
    at = table[table["target"] == target]
    equal = at[at["schedule"] == "equal"].set_index("method")["accuracy"]
    if "apbm" not in equal.index or "scratch" not in equal.index:
        return []
    row = at[(at["schedule"] == "equal") & (at["method"] == "apbm")].iloc[0]
    seeds = f"{row['n']:.0f} seed{'s' if row['n'] > 1 else ''}"
    words = (
        f"<b>{name}, {target:.4g} % of its parameters removed</b> ({row['epochs']:.0f} epochs, {seeds}): "
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
