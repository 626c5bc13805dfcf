"""The width solvers: their promises as properties, and their rules against brute force on small problems."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from closed_forms import closed_form
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apbm_core.compress import parse_keep
from apbm_core.counting import count_macs, count_parameters
from apbm_core.errors import ConfigError
from apbm_core.study.networks.models import build_model, cost_table, dense_widths
from apbm_core.study.networks.published_widths import widths_from_rates
from apbm_core.study.networks.widths import marginal_utility_model_widths, solve_model_widths, width_problem
from apbm_core.width_rules import balanced_widths, entropy_budget_widths, marginal_utility_widths, uniform_widths
from apbm_core.widths import WidthProblem

NETWORKS = st.tuples(st.sampled_from(["vgg16", "resnet56"]), st.sampled_from(["params", "macs"]))
TARGETS = st.floats(0.1, 0.95)


def chain(widths):
    """Weights of a chain of 3x3 convolutions from 3 channels."""
    return sum(9 * a * b for a, b in itertools.pairwise((3, *widths)))


@pytest.mark.parametrize("by", ["params", "macs"])
@pytest.mark.parametrize("name", ["vgg16", "resnet56"])
@pytest.mark.parametrize("target", [0.4884, 0.9274])
def test_solution_holds_for_the_network_that_is_built(name, by, target):
    solution = solve_model_widths(name, 10, target, by)
    count = count_parameters if by == "params" else count_macs
    dense, compact = count(build_model(name)), count(build_model(name, widths=solution.widths))
    assert (solution.dense_count, solution.count) == (dense, compact)
    assert solution.removed == pytest.approx(1 - compact / dense, abs=1e-12)
    assert abs(solution.removed - target) <= 0.0005
    assert solution.within_tolerance


@settings(max_examples=40, deadline=None)
@given(NETWORKS, TARGETS)
def test_target_is_met_with_one_ratio_for_all_layers(network, target):
    name, by = network
    dense = dense_widths(name)
    solution = uniform_widths(WidthProblem(dense, closed_form(name, 10, by), target))
    assert solution.within_tolerance
    assert abs(solution.removed - target) <= 0.0005
    # Some ratio explains all widths but for rounding and a filter or two that were moved.
    lowest = max((width - 2.5) / n for width, n in zip(solution.widths, dense, strict=True))
    highest = min((width + 2.5) / n for width, n in zip(solution.widths, dense, strict=True))
    assert lowest <= highest
    assert uniform_widths(width_problem(name, 10, target, by)) == solution


@settings(max_examples=20, deadline=None)
@given(NETWORKS, TARGETS, TARGETS)
def test_a_higher_target_never_keeps_more(network, one, other):
    name, by = network
    low, high = sorted((one, other))
    milder, harder = (solve_model_widths(name, 10, target, by) for target in (low, high))
    assert harder.count <= milder.count or high - low <= 0.001


@settings(max_examples=30, deadline=None)
@given(NETWORKS, st.floats(0.1, 0.8), st.sampled_from([2, 4, 8, 16]), st.integers(1, 12))
@example(("resnet56", "params"), 0.45, 16, 1)
def test_multiples_and_minimum_are_honoured(network, target, multiple, minimum):
    name, by = network
    try:
        solution = solve_model_widths(name, 10, target, by, multiple=multiple, minimum=minimum)
    except ConfigError:
        narrowest = [next(k for k in range(multiple, n + 1, multiple) if k >= minimum) for n in dense_widths(name)]
        count = closed_form(name, 10, by)
        assert 1 - count(narrowest) / count(dense_widths(name)) < target
        return
    assert all(width % multiple == 0 and width >= minimum for width in solution.widths)
    assert solution.within_tolerance == (abs(solution.removed - target) <= 0.0005)


def test_full_width_stays_allowed_when_it_is_not_a_multiple():
    solution = uniform_widths(WidthProblem([12, 20, 5], chain, 0.3, multiple=8, tolerance=0.2))
    assert all(width in choices for width, choices in zip(solution.widths, [{8, 12}, {8, 16, 20}, {5}], strict=True))
    assert abs(solution.removed - 0.3) <= 0.2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(0, 0.99))
def test_no_single_change_or_exchange_comes_closer_than_the_solution(dense, target):
    budget = (1 - target) * chain(dense)
    try:
        solution = uniform_widths(WidthProblem(dense, chain, target, tolerance=0))
    except ConfigError as error:
        reach = 1 - chain([1] * len(dense)) / chain(dense)
        assert reach < target
        assert f"{reach:.2%} is the most" in str(error)
        return
    assert solution.count == chain(solution.widths)
    error = abs(solution.count - budget)
    for widths in itertools.product(*(range(1, n + 1) for n in dense)):
        changes = sorted(a - b for a, b in zip(widths, solution.widths, strict=True) if a != b)
        if changes in ([1], [-1], [-1, 1]):
            assert abs(chain(widths) - budget) >= error - 1e-9


def test_too_coarse_widths_return_the_closest_and_say_so():
    solution = uniform_widths(WidthProblem([4, 4], sum, 0.4, multiple=2))
    # Of the possible sums 4, 6 and 8, 4 is the closest to 0.6 * 8 = 4.8.
    assert (solution.widths, solution.removed, solution.within_tolerance) == ((2, 2), 0.5, False)


def test_nothing_to_remove_keeps_the_dense_network():
    assert solve_model_widths("resnet20", 10, 0).widths == dense_widths("resnet20")


@settings(max_examples=25, deadline=None)
@given(st.data(), NETWORKS, st.floats(0.1, 0.9))
def test_entropy_budget_follows_its_formula_up_to_moved_filters(data, network, target):
    name, by = network
    dense = dense_widths(name)
    redundancy = data.draw(st.lists(st.floats(0.05, 0.95), min_size=len(dense), max_size=len(dense)))
    solution = entropy_budget_widths(width_problem(name, 10, target, by), redundancy)
    assert solution.within_tolerance
    assert abs(solution.removed - target) <= 0.0005
    for n, value, width in zip(dense, redundancy, solution.widths, strict=True):
        ideal = min(max(round(n * (1 - value) ** solution.exponent), 1), n)
        assert abs(width - ideal) <= 3


def test_entropy_budget_extremes():
    strict, mild = (width_problem("vgg16", 10, target) for target in (0.9, 0.5))
    equal = entropy_budget_widths(strict, [0.3] * 13)
    assert equal.widths == uniform_widths(strict).widths
    alike = entropy_budget_widths(mild, [1.0, *[0.2] * 12])
    assert alike.widths[0] <= 3
    assert alike.within_tolerance
    unlike = entropy_budget_widths(strict, [1e-300, *[0.5] * 12])
    assert unlike.widths[0] >= 62
    assert math.isfinite(unlike.exponent)


def test_rates_count_as_decimals():
    # floor(n (1 - rate)) with exact decimals, for every n up to 512 and every rate of two decimals
    for hundredths in range(100):
        ns = range(100, 513)
        expected = tuple(n * (100 - hundredths) // 100 for n in ns)
        assert widths_from_rates(ns, [hundredths / 100] * len(ns)) == expected
    assert widths_from_rates([320], [0.9]) == (32,)
    assert widths_from_rates([10, 10], [np.float32(0.6), Fraction(3, 5)]) == (4, 4)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ([0.5], "1 prune rates for 2 layers"),
        ([0.5, 1.0], "layer 2 is 1.0"),
        ([-0.1, 0.5], "layer 1 is -0.1"),
        ([math.nan, 0.5], "layer 1 is nan"),
        (["0.5", 0.5], "layer 1 is '0.5'"),
        ([True, 0.5], "layer 1 is True"),
        ([0.5, 0.99], "none of layer 2's 64 filters"),
    ],
)
def test_impossible_rates_are_named(rates, words):
    with pytest.raises(ConfigError, match=words):
        widths_from_rates([16, 64], rates)


@pytest.mark.parametrize(
    ("value", "kept"),
    [(1, 1), (1.0, 10), (0.5, 5), (10, 10), (0.01, 1), (0.76, 8), (np.int64(3), 3), (np.float32(0.5), 5)],
)
def test_keep_is_a_ratio_or_a_number_of_filters(value, kept):
    assert parse_keep(value, 10, "conv1") == kept
    assert type(parse_keep(value, 10, "conv1")) is int


@pytest.mark.parametrize(
    "value", [0, 0.0, 1.2, 11, -1, -0.5, True, False, math.nan, math.inf, "0.5", "3", None, [5], 5.0]
)
def test_impossible_keep_is_named(value):
    with pytest.raises(ConfigError, match=r"'layer1\.0\.conv1' is .*up to 1\.0.* from 1 to 10"):
        parse_keep(value, 10, "layer1.0.conv1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": 1}, "target is 1;"),
        ({"target": -0.1}, r"target is -0\.1;"),
        ({"target": math.nan}, "target is nan"),
        ({"target": "0.5"}, "target is '0.5'"),
        ({"target": 92.74}, r"target is 92\.74.*0\.9274"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"multiple": 0}, "multiple is 0"),
        ({"minimum": 1.5}, "minimum is 1.5"),
        ({"dense": []}, "dense is empty"),
        ({"dense": [8, 0]}, "dense width is 0"),
        ({"target": 0.9, "minimum": 8}, "Cannot remove 90 %.*0.00% is the most"),
    ],
)
def test_impossible_problems_are_named(changes, words):
    arguments = {"dense": [8, 8], "count": chain, "target": 0.5} | changes
    with pytest.raises(ConfigError, match=words):
        WidthProblem(**arguments)


@pytest.mark.parametrize("redundancy", [[0.5], [0.5, 0], [0.5, 1.1], [0.5, math.nan]])
def test_impossible_redundancies_are_named(redundancy):
    with pytest.raises(ConfigError, match="redundanc"):
        entropy_budget_widths(WidthProblem([8, 8], chain, 0.5), redundancy)


def test_balanced_widths_have_nearly_the_largest_harmonic_mean_that_fits():
    dense, removed = (6, 8, 10), 0.6

    def count(w):
        return 3 * w[0] + w[0] * w[1] + w[1] * w[2] + 10 * w[2]

    def loss(w):
        return sum(1 / k for k in w)

    budget = (1 - removed) * count(dense)
    best = min(loss(w) for w in itertools.product(*(range(1, n + 1) for n in dense)) if count(w) <= budget)
    found = balanced_widths(WidthProblem(dense, count, removed, tolerance=0.02))
    assert found.within_tolerance and best <= loss(found.widths) * 1.001 and loss(found.widths) < 1.05 * best


@pytest.mark.parametrize(("name", "target"), [("vgg16", 0.9274), ("resnet56", 0.4884)])
def test_balanced_widths_keep_the_cheap_early_filters(name, target):
    solution = solve_model_widths(name, 10, target, rule="balanced")
    assert solution.within_tolerance and solution.removed == pytest.approx(target, abs=0.0005)
    uniform = solve_model_widths(name, 10, target).widths
    n = len(uniform) // 3
    assert solution.widths[:2] == dense_widths(name)[:2]
    assert sum(solution.widths[:n]) > sum(uniform[:n]) and sum(solution.widths[-n:]) < sum(uniform[-n:])
    sums = [sum(1 / k for k in widths) for widths in (solution.widths, uniform)]
    assert sums[0] < sums[1]


def test_marginal_utility_buys_one_filter_after_the_other_where_it_is_worth_most():
    """The rule written out for a chain of 3x3 convolutions from 3 channels: s_l(c_l) / (9 (c_{l-1} + c_{l+1}))."""
    dense, removed = (7, 9, 8), 0.5
    generator = torch.Generator().manual_seed(3)
    for mac_weight in (0.0, 1e-4, -1e-4):
        scores = [torch.rand(n, generator=generator).tolist() for n in dense]
        curves = [sorted(layer, reverse=True) for layer in scores]
        budget, pixels = (1 - removed) * chain(dense), (64, 16, 4)

        def macs(widths, pixels=pixels):
            return sum(p * 9 * a * b for p, (a, b) in zip(pixels, itertools.pairwise((3, *widths)), strict=True))

        widths = [1, 1, 1]
        while True:
            worth = {}
            for layer, (width, n) in enumerate(zip(widths, dense, strict=True)):
                around = (3, *widths, 0)
                price = 9 * (around[layer] + around[layer + 2])
                pixel_price = 9 * (around[layer] * pixels[layer] + around[layer + 2] * (*pixels, 0)[layer + 1])
                if width < n and chain(widths) + price <= budget:
                    worth[layer] = curves[layer][width] / price + mac_weight * pixel_price
            if not worth:
                break
            widths[max(worth, key=worth.get)] += 1
        problem = WidthProblem(dense, chain, removed, tolerance=0.05)  # so wide that nothing is left to polish
        assert problem.error(tuple(widths)) <= problem.slack
        assert marginal_utility_widths(problem, scores, macs, mac_weight).widths == tuple(widths)


@pytest.mark.parametrize("removed", [0.2, 0.5, 0.7])
def test_marginal_utility_keeps_the_best_filters_of_all_where_each_costs_the_same(removed):
    dense = (4, 5, 3)
    scores = [torch.rand(n).tolist() for n in dense]
    curves = [[sum(sorted(layer, reverse=True)[:k]) for k in range(len(layer) + 1)] for layer in scores]

    def value(widths):
        return sum(curve[width] for curve, width in zip(curves, widths, strict=True))

    problem = WidthProblem(dense, sum, removed, tolerance=0.1)
    found = marginal_utility_widths(problem, scores).widths
    allowed = itertools.product(*(range(1, n + 1) for n in dense))
    assert value(found) == pytest.approx(max(value(widths) for widths in allowed if problem.fits(widths)))


@pytest.mark.parametrize("name", ["vgg16", "resnet20"])
def test_marginal_utility_meets_the_target_of_a_real_network_and_follows_the_scores(name):
    dense = dense_widths(name)
    falling = [[1 / (rank + 1) for rank in range(n)] for n in dense]
    equal = marginal_utility_model_widths(name, 10, falling, 0.9)
    late = marginal_utility_model_widths(name, 10, [*falling[:-2], [50.0] * dense[-2], falling[-1]], 0.9)
    assert equal.within_tolerance and late.within_tolerance and min(equal.widths) >= 4
    assert late.widths[-2] > equal.widths[-2]
    count = cost_table(name, 10).size_function("macs")
    dear = marginal_utility_model_widths(name, 10, falling, 0.7, mac_weight=1e-8)
    cheap = marginal_utility_model_widths(name, 10, falling, 0.7, mac_weight=-1e-8)
    assert count(dear.widths) > 1.05 * count(cheap.widths)


@pytest.mark.parametrize("name", ["vgg16", "resnet56"])
def test_tied_layers_of_a_stage_stay_as_wide_as_each_other(name):
    dense = dense_widths(name)
    scores = [torch.rand(n).tolist() for n in dense]
    solution = marginal_utility_model_widths(name, 10, scores, 0.8, tied=True)
    stages = {n: {width for width, of in zip(solution.widths, dense, strict=True) if of == n} for n in dense}
    assert all(len(widths) == 1 for widths in stages.values()) and len(solution.widths) == len(dense)
    assert solution.removed == pytest.approx(0.8, abs=0.005)
    assert solution.count == cost_table(name).size_function()(solution.widths)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": [[1.0] * 4]}, "one for each filter of each layer"),
        ({"scores": [[1.0] * 4, [1.0] * 3]}, r"scores of \[4, 3\] filters for layers of \[4, 4\]"),
        ({"scores": [[1.0] * 4, [1.0, math.nan, 1.0, 1.0]]}, "scores of layer 2"),
        ({"scores": [[1.0, -1.0, 1.0, 1.0], [1.0] * 4]}, "scores of layer 1"),
        ({"mac_weight": 0.5}, "needs `macs`"),
        ({"mac_weight": math.inf, "macs": chain}, "mac_weight is inf"),
    ],
)
def test_impossible_utilities_are_named(changes, words):
    arguments = {"problem": WidthProblem((4, 4), chain, 0.5), "scores": [[1.0] * 4] * 2} | changes
    with pytest.raises(ConfigError, match=words):
        marginal_utility_widths(**arguments)
