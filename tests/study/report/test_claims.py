"""Rivals and claims: who is set beside whom, with which noise, and the three verdicts."""

import math

import numpy as np
import pandas as pd
import pytest
from fake_records import fake_record
from scipy import stats

from apbm_core.study.report.claims import claims_frame
from apbm_core.study.report.frames import noises, points, runs_frame
from apbm_core.study.report.rivals import against_rivals, cell_style, matrix, over_targets, power_notes

LEVELS = {"dense": 0.92, "apbm": 0.90, "scratch": 0.899, "hrank": 0.86, "polarization": 0.93, "swp": 0.901, "l1": 0.87}
AT_HEADLINE = {"model": "resnet56", "dataset": "cifar10"}


def grid(targets=(0.4884,), seeds=3, levels=LEVELS, sd=0.002, **config):
    """Records of a grid whose methods differ by ``levels``, whose seeds shift all of them, and with noise."""
    generator = np.random.default_rng(0)
    shift = {seed: generator.normal(0, 0.01) for seed in range(seeds)}
    return [
        fake_record(
            method,
            level + shift[seed] - 0.05 * target + generator.normal(0, sd),
            seed,
            seconds=10 + len(method),
            target=0.0 if method == "dense" else target,
            **AT_HEADLINE | config,
        )
        for target in targets
        for seed in range(seeds)
        for method, level in levels.items()
        if method != "dense" or target == targets[0]
    ]


def verdicts(records, **kwargs) -> pd.DataFrame:
    table = claims_frame(records, **kwargs)
    return table[table["setting"] == "ResNet56, CIFAR-10"].set_index("claim")


def test_the_claims_have_three_verdicts_and_reasons_and_those_that_can_be_given_lead():
    table = verdicts(grid())
    assert table.loc["better accuracy than HRank", "verdict"] == "supported"
    assert table.loc["better accuracy than Polarization", "verdict"] == "contradicted"
    assert table.loc["better accuracy than SWP", "verdict"] == "inconclusive"
    assert "would have been seen" in table.loc["better accuracy than SWP", "measured"]
    assert table.loc["less training time than SWP", "verdict"] == "contradicted"  # 14 s against 13
    imposed = table.loc["48.84 % of the parameters removed", "verdict"]
    assert imposed == "not tested: the share is imposed on every method"
    assert table.loc["higher compression at the same accuracy than SWP", "verdict"].endswith("more than one target")
    whole = claims_frame(grid())
    decided = whole["verdict"].isin(["supported", "contradicted"]).tolist()
    assert decided == sorted(decided, reverse=True)
    never = whole[whole["setting"] == "VGG16, CIFAR-100"]
    assert never["verdict"].tolist() == ["not tested: nothing was run here"]
    assert verdicts(grid(seeds=1)).loc["better accuracy than HRank", "verdict"] == "not tested: needs 3 seeds, has 1"
    assert set(claims_frame([])["verdict"]) == {"not tested: nothing was run here"}


def test_a_control_that_runs_where_it_is_named_has_a_claim_where_it_ran():
    claim = "fusing loses less accuracy than passing the input on alone (APBM without fusion)"
    assert claim not in verdicts(grid()).index
    beside = verdicts(grid(levels=LEVELS | {"passing": LEVELS["apbm"] - 0.05}))
    assert beside.loc[claim, "verdict"] == "supported"


def test_a_claim_has_the_interval_of_the_table_of_rivals():
    """Also where SWP is told apart by what it does at another target."""
    records = grid(targets=(0.4884, 0.7))
    wild = [r.config.method == "swp" and (r.config.target, r.config.seed) == (0.7, 1) for r in records]
    changed = [r.model_copy(update={"test_accuracy": 0.1}) if w else r for r, w in zip(records, wild, strict=True)]
    rivals = against_rivals(runs_frame(changed)).query("target == 48.84").set_index("rival")
    for rival in ("HRank", "SWP"):
        measured = verdicts(changed).loc[f"better accuracy than {rival}", "measured"]
        assert f"± {rivals.loc[rival, 'interval']:.2f} points" in measured


def test_compression_is_judged_by_the_mean_over_the_targets():
    table = verdicts(grid(targets=(0.25, 0.4884, 0.7)))
    assert table.loc["higher compression at the same accuracy than HRank", "verdict"] == "supported"
    assert table.loc["higher compression at the same accuracy than Polarization", "verdict"] == "contradicted"
    assert "mean of 3 targets" in table.loc["higher compression at the same accuracy than SWP", "measured"]


def test_a_comparison_is_of_the_same_seeds_with_the_targets_pooled_noise():
    frame = runs_frame(grid())
    table = against_rivals(frame).set_index("rival")
    wide = frame[frame["target"] > 0].pivot(index="method", columns="seed", values="accuracy").dropna()
    residual = wide.sub(wide.mean(axis=1), axis=0).sub(wide.mean() - wide.to_numpy().mean(), axis=1)
    df = (len(wide) - 1) * 2
    sd = math.sqrt((residual**2).to_numpy().sum() / df)
    assert noises(frame)["resnet56", "cifar10", 48.84].common.sd == pytest.approx(sd)
    assert table["interval"].to_numpy() == pytest.approx(stats.t.ppf(0.975, df) * sd * math.sqrt(2 / 3))
    expected = (wide.loc["apbm"] - wide.loc["hrank"]).mean()
    assert table.loc["HRank", "difference"] == pytest.approx(expected)
    p = 2 * stats.t.sf(expected / (sd * math.sqrt(2 / 3)), df)
    assert p < table.loc["HRank", "p (Holm)"] <= len(table) * p * 1.0001
    marks = points(frame).set_index("method")
    assert marks.loc["apbm", "interval"] == pytest.approx(stats.t.ppf(0.975, df) * sd / math.sqrt(3))


def test_over_the_targets_an_interval_is_narrower_and_only_whole_seeds_count():
    records = grid(targets=(0.25, 0.4884, 0.7, 0.85, 0.95))
    frame = runs_frame(records)
    one = against_rivals(frame)
    whole = over_targets(frame).set_index("rival")
    assert whole.loc["HRank", "points"] == 5 and whole.loc["HRank", "n"] == 3
    each = one[one["rival"] == "HRank"]["difference"]
    assert whole.loc["HRank", "difference"] == pytest.approx(each.mean())
    assert whole.loc["HRank", "interval"] < 0.6 * one["interval"].mean()


def test_of_a_study_under_way_the_mean_is_over_the_targets_that_enough_seeds_share():
    def hrank(seeds, *missing):
        records = grid(targets=(0.25, 0.4884, 0.7), seeds=seeds)
        there = [r for r in records if (r.config.method, r.config.seed, r.config.target) not in missing]
        frame = runs_frame(there)
        each = against_rivals(frame).query("rival == 'HRank'").set_index("target")["difference"]
        return over_targets(frame).set_index("rival").loc["HRank", ["points", "n", "difference"]], each

    row, each = hrank(3, ("hrank", 1, 0.7))
    assert (row["points"], row["n"]) == (2, 3) and row["difference"] == pytest.approx(each[[25.0, 48.84]].mean())
    row, _ = hrank(4, ("hrank", 1, 0.7))  # three seeds have all
    assert (row["points"], row["n"]) == (3, 3)
    row, _ = hrank(3, ("hrank", 1, 0.7), ("hrank", 2, 0.25))  # no two targets have three seeds
    assert (row["points"], row["n"]) == (3, 1)


def test_the_matrix_names_each_rival_and_says_verdict_and_time():
    frame = runs_frame(grid())
    table = against_rivals(frame)
    cells = matrix(table).set_index("rival")["APBM, equal epochs"]
    assert cells["HRank"].endswith("above, 0.93 x time") and cells["Polarization"].split()[3].startswith("below")
    assert "inconclusive" in cells["SWP"] and cell_style(cells["SWP"]) == ""
    assert cell_style(cells["HRank"]) != cell_style(cells["Polarization"]) != ""
    ((bed, note),) = power_notes(frame, table)
    assert bed == ("resnet56", "cifar10", 48.84) and note.startswith("Runs of one method spread by sd 0.")
    one = runs_frame(grid(seeds=1))
    assert "(n = 1)" in matrix(against_rivals(one)).iloc[0, 1]
