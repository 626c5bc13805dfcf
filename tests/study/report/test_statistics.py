"""The statistics keep what they promise: against simulations, closed testing, least squares and the ablation."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from apbm_core.study.report.statistics import (
    Comparison,
    Noise,
    bed_noise,
    design_sees,
    holm,
    judge,
    mean_noise,
    pooled_noise,
)


def bed(generator, methods=12, seeds=3, sd=0.6, effects=None) -> pd.DataFrame:
    """Runs of a design of randomised blocks; the seeds shift all methods alike, by far more than the noise."""
    effects = np.zeros(methods) if effects is None else effects
    accuracies = 70 + effects[:, None] + generator.normal(0, 2, seeds) + generator.normal(0, sd, (methods, seeds))
    method, seed = np.indices((methods, seeds))
    return pd.DataFrame({"method": method.ravel(), "seed": seed.ravel(), "accuracy": accuracies.ravel()})


def compared(rows: pd.DataFrame, ours: int, theirs: int) -> Comparison:
    own, other = (rows["accuracy"][rows["method"] == method].to_numpy() for method in (ours, theirs))
    return Comparison(tuple(own - other))


def test_the_pooled_residual_is_that_of_the_analysis_of_variance():
    rows = bed(np.random.default_rng(0))
    wide = rows.pivot(index="method", columns="seed", values="accuracy").to_numpy()
    centred = wide - wide.mean(0) - wide.mean(1, keepdims=True) + wide.mean()  # the textbook's, for a complete design
    noise = pooled_noise(rows, "method")
    assert noise.df == 11 * 2
    assert noise.sd == pytest.approx(math.sqrt((centred**2).sum() / 22))


def test_missing_runs_single_runs_and_identical_networks_are_counted_right():
    rows = bed(np.random.default_rng(1), methods=5)
    noise = pooled_noise(rows, "method")
    alone = pd.concat([rows, pd.DataFrame([{"method": 99, "seed": 0, "accuracy": 10.0}])])
    assert pooled_noise(alone, "method") == noise  # one run of a method says nothing of the noise
    missing = rows.drop(index=[0])
    assert pooled_noise(missing, "method").df == noise.df - 1
    rows["network"] = [f"{row.method}-{row.seed}" for row in rows.itertuples()]
    twin = rows[rows["method"] == 0].assign(method=100)
    doubled = pooled_noise(pd.concat([rows, twin]), "method", network="network")
    assert doubled.df == noise.df and doubled.sd == pytest.approx(noise.sd)
    assert pooled_noise(pd.concat([rows, twin]), "method").df == noise.df + 2
    assert pooled_noise(rows[rows["seed"] == 0], "method").df == 0


def test_intervals_cover_the_truth_in_95_of_100_studies():
    generator, hits, studies = np.random.default_rng(2), 0, 300
    effects = np.linspace(-1, 1, 12)
    for _ in range(studies):
        rows = bed(generator, effects=effects)
        table = judge([compared(rows, 10, 3)], pooled_noise(rows, "method"))
        hits += abs(table["difference"][0] - (effects[10] - effects[3])) <= table["interval"][0]
    assert abs(hits / studies - 0.95) < 3 * math.sqrt(0.05 * 0.95 / studies)


def test_a_method_that_spreads_far_more_is_told_apart_and_judged_by_itself():
    """Else its spread would widen all the others' intervals and narrow its own; both cover the truth so."""
    generator, studies, names = np.random.default_rng(7), 120, [f"method {number}" for number in range(8)]
    told, hits, pooled_hits = 0, {1: 0, 7: 0}, 0
    for _ in range(studies):
        rows = bed(generator, methods=8, sd=np.array([0.6] * 7 + [9.0])[:, None])
        noise = bed_noise(rows.assign(method=[names[number] for number in rows["method"]]), "method")
        told += set(noise.own) == {names[7]}
        for other in hits:
            pair = compared(rows, 0, other)
            hits[other] += abs(pair.mean) <= noise.between(names[0], names[other]).half_width(3)
        pooled_hits += abs(compared(rows, 0, 7).mean) <= pooled_noise(rows, "method").half_width(3)
        assert noise.common.df == 12 or len(noise.own) != 1
    assert told / studies > 0.9
    margin = 3 * math.sqrt(0.05 * 0.95 / studies)
    assert abs(hits[1] / studies - 0.95) < margin and abs(hits[7] / studies - 0.95) < margin
    assert pooled_hits / studies < 0.85


def test_methods_that_spread_alike_are_hardly_ever_told_apart():
    generator, studies = np.random.default_rng(8), 150
    found = [bed_noise(bed(generator, methods=8), "method") for _ in range(studies)]
    assert sum(bool(noise.own) for noise in found) / studies < 0.01 + 3 * math.sqrt(0.01 / studies)
    rows = bed(generator, methods=8)
    assert bed_noise(rows, "method").common == pooled_noise(rows, "method")


def test_the_own_spread_is_the_sample_variance_beside_the_seeds_effects():
    rows = bed(np.random.default_rng(9), methods=6)
    rows.loc[rows["method"] == 5, "accuracy"] += np.array([0.0, -30.0, 25.0])
    noise = bed_noise(rows, "method")
    wide = rows.pivot(index="method", columns="seed", values="accuracy")
    others = wide.loc[:4]
    assert noise.own[5].df == 2
    assert noise.own[5].sd == pytest.approx((wide.loc[5] - others.mean()).std(ddof=1))
    assert noise.common == pooled_noise(rows[rows["method"] < 5], "method")
    both = noise.between(0, 5)
    assert both.sd == pytest.approx(math.sqrt((noise.common.sd**2 + noise.own[5].sd ** 2) / 2)) and both.df == 2
    assert noise.between(0, 1) == noise.common == noise.of(3) and noise.of(5) == noise.own[5]


def test_holm_keeps_the_family_wise_error_where_uncorrected_p_values_do_not():
    generator, studies = np.random.default_rng(3), 250
    corrected = plain = 0
    for _ in range(studies):
        rows = bed(generator)
        table = judge([compared(rows, m, 0) for m in range(1, 12)], pooled_noise(rows, "method"))
        corrected += table["verdict"].isin(["above", "below"]).any()
        plain += (table["p"] < 0.05).any()
    assert corrected / studies < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    assert plain / studies > 0.15


def test_holm_is_closed_testing_with_bonferroni():
    generator = np.random.default_rng(4)
    for _ in range(30):
        p = generator.uniform(0, 0.2, 5) ** 2
        closed = [
            max(
                min(1.0, len(subset) * min(p[i] for i in subset))
                for size in range(1, 6)
                for subset in itertools.combinations(range(5), size)
                if place in subset
            )
            for place in range(5)
        ]
        assert holm(p) == pytest.approx(closed)
    assert math.isnan(holm([0.01, math.nan])[1]) and holm([0.01, math.nan])[0] == 0.01


@pytest.mark.parametrize("comparisons", [1, 9])
def test_the_detectable_difference_is_detected_in_80_of_100_studies(comparisons):
    generator, noise, studies = np.random.default_rng(5), Noise(0.6, 22), 4000
    true = noise.detectable(3, comparisons)
    differences = true + generator.normal(0, noise.standard_error(3), studies)
    sds = noise.sd * np.sqrt(generator.chisquare(noise.df, studies) / noise.df)
    p = 2 * stats.t.sf(np.abs(differences) / (sds * math.sqrt(2 / 3)), noise.df)
    assert abs((p < 0.05 / comparisons).mean() - 0.8) < 3 * math.sqrt(0.16 / studies)


def test_five_points_of_three_seeds_see_half_a_point_where_one_point_sees_more_than_one():
    """The design of the curves: the spread of the ablation's ResNet20, ten methods."""
    one = Noise(0.61, 18)
    assert 1.1 < one.detectable(3) < 2.8
    over_all = mean_noise([Noise(0.61, 18) for _ in range(5)])
    assert over_all.df == 90 and over_all.sd == pytest.approx(0.61 / math.sqrt(5))
    assert over_all.detectable(3) == pytest.approx(one.detectable(15), rel=0.05)
    assert 0.4 < over_all.detectable(3) < 0.7


def test_an_estimate_that_serves_several_targets_knows_no_more_for_that():
    shared, own = Noise(0.8, 12), Noise(0.8, 12)
    assert mean_noise([shared] * 4).df == 12 and mean_noise([shared] * 4).sd == pytest.approx(0.4)
    assert mean_noise([shared, own]).df == 24 and 12 < mean_noise([shared, shared, own]).df < 24


def test_satterthwaite_covers_beds_of_different_noise():
    generator, hits, studies = np.random.default_rng(6), 0, 120
    for _ in range(studies):
        beds = [bed(generator, methods=6, sd=sd) for sd in (0.2, 0.5, 1.5)]
        noise = mean_noise([pooled_noise(rows, "method") for rows in beds])
        mean = np.mean([compared(rows, 1, 0).mean for rows in beds])
        hits += abs(mean) <= noise.half_width(3)
    assert abs(hits / studies - 0.95) < 0.06


def test_identical_networks_get_words_instead_of_an_interval():
    table = judge(
        [Comparison((0.0, 0.0, 0.0), 3), Comparison((0.0, 0.0, 0.7), 2), Comparison((2.0, 2.1, 1.9))], Noise(0.3, 20)
    )
    assert list(table["verdict"]) == ["one network", "one network in 2 of 3 pairs", "above"]
    assert table["interval"].isna().tolist() == [True, True, False]
    assert table["p (Holm)"][2] == table["p"][2]  # the others are no comparisons


def test_verdicts_differ_between_opposite_undecided_and_too_few():
    found = [
        Comparison((2.0, 2.0, 2.0)),
        Comparison((-2.0, -2.0, -2.0)),
        Comparison((0.1, 0.2, 0.0)),
        Comparison((9.0,)),
    ]
    table = judge(found, Noise(0.5, 30))
    assert list(table["verdict"]) == ["above", "below", "inconclusive", "too few pairs (1 of 3)"]
    assert table["interval"][3] == pytest.approx(stats.t.ppf(0.975, 30) * 0.5 * math.sqrt(2))
    unknown = judge([Comparison((2.0, 2.0, 2.0))], Noise(math.nan, 0))
    assert unknown["verdict"][0] == "no spread known" and math.isnan(unknown["interval"][0])
    assert "run more seeds" in design_sees(Noise(math.nan, 0), 3, 1)
    assert "sd 0.50 points (30 degrees of freedom)" in design_sees(Noise(0.5, 30), 3, 4)
