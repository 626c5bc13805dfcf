"""The mathematics of scoring against the literal definitions, written out as loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apbm_core.errors import ConfigError
from apbm_core.similarity import entropy, log_similarity, pairwise_distances, relative_entropy, scale_free

shapes = st.tuples(st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 3]))
temperatures = st.floats(1e-2, 30)


def filters(shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    n, channels, kernel = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, kernel, kernel, generator=generator, dtype=torch.float64)


def distances_by_loop(weight: torch.Tensor) -> list[list[float]]:
    rows = weight.flatten(1).tolist()
    return [[math.sqrt(sum((a - b) ** 2 for a, b in zip(u, v, strict=True))) for v in rows] for u in rows]


def distributions_by_loop(distance: list[list[float]], temperature: float) -> list[list[float]]:
    result = []
    for row in distance:
        powers = [math.exp(-temperature * d) for d in row]
        result.append([power / sum(powers) for power in powers])
    return result


def importance_by_loop(p: list[list[float]]) -> list[float]:
    n = range(len(p))
    return [sum(p[i][j] * math.log(p[i][j] / p[k][j]) for k in n for j in n) for i in n]


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 10**6))
def test_distances_are_the_euclidean_ones(shape, seed):
    weight = filters(shape, seed)
    torch.testing.assert_close(
        pairwise_distances(weight), torch.tensor(distances_by_loop(weight), dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


@settings(deadline=None, max_examples=100)
@given(shapes, st.integers(0, 10**6), temperatures)
def test_entropy_and_importance_equal_the_triple_loop(shape, seed, temperature):
    distance = pairwise_distances(filters(shape, seed))
    p = distributions_by_loop(distance.tolist(), temperature)
    log_p = log_similarity(distance, temperature)
    loop_entropy = torch.tensor([-sum(q * math.log(q) for q in row if q > 0) for row in p], dtype=torch.float64)
    torch.testing.assert_close(log_p.exp(), torch.tensor(p, dtype=torch.float64), rtol=1e-10, atol=1e-300)
    torch.testing.assert_close(entropy(log_p), loop_entropy, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        relative_entropy(log_p), torch.tensor(importance_by_loop(p), dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


def test_the_closed_form_of_the_paper_notes_is_the_same_number():
    log_p = log_similarity(pairwise_distances(filters((12, 3, 3), 0)), 2.0)
    closed = -12 * entropy(log_p) - log_p.exp() @ log_p.sum(0)
    torch.testing.assert_close(relative_entropy(log_p), closed, rtol=1e-12, atol=0)


def test_importance_agrees_with_pytorchs_divergence():
    log_p = log_similarity(pairwise_distances(filters((6, 2, 3), 3)), 1.5)
    kl = torch.nn.functional.kl_div  # kl_div(a, b) is KL(b || a)
    expected = [sum(kl(log_p[k], log_p[i], log_target=True, reduction="sum") for k in range(6)) for i in range(6)]
    torch.testing.assert_close(relative_entropy(log_p), torch.stack(expected))


def test_a_large_temperature_ranks_by_the_sum_of_distances():
    distance = pairwise_distances(filters((40, 3, 3), 1))
    importance = relative_entropy(log_similarity(distance, 1e6))
    assert torch.equal(importance.argsort(), distance.sum(1).argsort())
    torch.testing.assert_close(importance, 1e6 * distance.sum(1))  # all mass is one's own: KL(p_i || p_k) = T D_ik


@pytest.mark.parametrize("temperature", [1e-12, 1.0, 4622.0, 1e4, 1e30])
@pytest.mark.parametrize("case", ["random", "duplicates", "all alike", "zeros", "one", "huge", "tiny"])
def test_everything_is_finite_whatever_the_filters(case, temperature):
    weight = filters((8, 3, 3), 5)
    weight = {
        "random": weight,
        "duplicates": weight[torch.tensor([0, 0, 1, 1, 2, 3, 4, 4])],
        "all alike": weight[:1].expand(8, -1, -1, -1),
        "zeros": torch.zeros_like(weight),
        "one": weight[:1],
        "huge": 1e30 * weight,
        "tiny": 1e-30 * weight,
    }[case]
    distance = pairwise_distances(weight)
    for d in (distance, scale_free(distance)):
        log_p = log_similarity(d, temperature)
        p = log_p.exp()
        assert torch.isfinite(log_p).all()
        torch.testing.assert_close(p.sum(1), torch.ones(len(p), dtype=torch.float64))
        for quantity in (entropy(log_p), relative_entropy(log_p)):
            assert quantity.shape == (len(weight),) and torch.isfinite(quantity).all()
            assert quantity.min() >= -1e-9


def test_duplicates_far_from_the_origin_are_at_distance_zero():
    weight = filters((6, 3, 3), 2)
    weight[3] = weight[1]
    weight[4] = weight[1] + 1e-9
    weight += 1e4  # the squared norms are 1e9 times the squared distances
    distance = pairwise_distances(weight)
    assert distance[1, 3] == 0
    torch.testing.assert_close(distance[1, 4].item(), (weight[1] - weight[4]).norm().item(), rtol=1e-10, atol=0)


def test_single_precision_filters_are_measured_in_double():
    weight = filters((5, 2, 3), 9).float()
    torch.testing.assert_close(pairwise_distances(weight), pairwise_distances(weight.double()), rtol=0, atol=0)


@pytest.mark.parametrize("n", [4, 64, 512])
@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_self_mass_of_equidistant_filters_depends_on_tau_alone(n, scale):
    """methods.md 1: p_ii = 1 / (1 + (n - 1) n^-tau), whatever the scale."""
    weight = scale * torch.eye(n, dtype=torch.float64)
    for tau in (1.0, 1.5, 2.0):
        log_p = log_similarity(scale_free(pairwise_distances(weight)), tau * math.log(n))
        expected = torch.full((n,), 1 / (1 + (n - 1) * n**-tau), dtype=torch.float64)
        torch.testing.assert_close(log_p.diagonal().exp(), expected)


def test_mean_distance_is_one_after_scaling():
    scaled = scale_free(pairwise_distances(filters((10, 3, 3), 0)))
    assert scaled[~torch.eye(10, dtype=torch.bool)].mean().item() == pytest.approx(1)


def test_bad_input_is_named():
    weight = filters((3, 1, 3), 0)
    weight[1, 0, 0, 0] = float("nan")
    with pytest.raises(ConfigError, match="NaN"):
        pairwise_distances(weight)
    for temperature in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="temperature"):
            log_similarity(torch.zeros(2, 2), temperature)
