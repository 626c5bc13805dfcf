"""The ablation's variants of the fusion: each by its definition, and that nothing else changes with them."""

import math

import pytest
import torch
from torch import nn

import apbm_core
from apbm_core.similarity import log_similarity, pairwise_distances, scale_free
from apbm_core.study.methods.variants import VariantFusion, VariantSettings, distances


def bank(n=8, c=3, seed=0, dtype=torch.float64):
    return torch.randn(n, c, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scored(m=3, progress=0.0, w=None, **settings):
    w = bank() if w is None else w
    fusion = VariantFusion(len(w), m, VariantSettings(**settings)).to(w)
    fusion.choose(w, progress)
    fusion.rescore(w, progress, reselect=False)
    return fusion, w


def test_without_a_variant_it_is_the_methods_own_fusion():
    w = bank()
    own = apbm_core.FusionSettings().fusion(8, 3).to(w)
    own.choose(w, 0.0)
    own.rescore(w, 0.0)
    fusion, _ = scored()
    assert torch.equal(fusion.matrix, own.matrix) and torch.equal(fusion.selected, own.selected)
    assert fusion.last == own.last


@pytest.mark.parametrize("mass", ["all", "unimportant", "assigned"])
def test_rows_are_convex_mixtures_and_keep_to_their_mass_rule(mass):
    fusion, _ = scored(mass=mass, rescale=False)
    matrix, selected = fusion.matrix, fusion.selected
    torch.testing.assert_close(matrix.sum(1), torch.ones(3, dtype=torch.float64))
    assert (matrix >= 0).all()
    others = matrix[:, selected] - torch.diag(matrix[:, selected].diagonal())
    assert (others > 0).any() == (mass == "all")


def test_assigned_mass_divides_each_unimportant_filter_among_the_kept_ones():
    fusion, w = scored(mass="assigned", rescale=False)
    log_p = log_similarity(scale_free(pairwise_distances(w)), math.log(8))
    kept = fusion.selected.tolist()
    by_loop = torch.zeros(3, 8, dtype=torch.float64)
    for j in range(8):
        weights = [math.exp(log_p[j, k]) for k in kept]
        for slot, k in enumerate(kept):
            by_loop[slot, j] = float(j == k) if j in kept else weights[slot] / sum(weights)
    torch.testing.assert_close(fusion.matrix, by_loop / by_loop.sum(1, keepdim=True))


def test_without_fusion_the_important_filters_are_selected_as_they_are():
    fusion, w = scored(fuse=False)
    assert fusion.is_selection and torch.equal(fusion(w), w[fusion.selected])


def test_a_fixed_selection_stays_when_reselecting_is_off():
    fusion, w = scored(reselect=False)
    before = fusion.selected.clone()
    fusion.rescore(bank(seed=7), 0.3)
    assert torch.equal(fusion.selected, before)


@pytest.mark.parametrize(
    ("score", "key"),
    [
        ("l1", lambda w: w.abs().flatten(1).sum(1)),
        ("order", lambda w: -torch.arange(len(w))),
    ],
)
def test_other_scores(score, key):
    fusion, w = scored(score=score)
    assert fusion.selected.tolist() == sorted(key(w).argsort(descending=True)[:3].tolist())


def test_entropy_score_keeps_the_filter_unlike_the_others():
    w = bank(n=6)
    w[:5] = w[0] + 0.01 * w[:5]
    fusion, _ = scored(m=1, score="entropy", w=w)
    assert fusion.selected.tolist() == [5]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_selection_keeps_the_memory_layout(layout):
    fusion, w = scored(fuse=False)
    selected = fusion(w.contiguous(memory_format=layout))
    assert fusion.is_selection and torch.equal(selected, w[fusion.selected])
    assert selected.is_contiguous(memory_format=layout)


def test_gains_are_the_lengths_of_the_banks_filters():
    w = bank(dtype=torch.float32)
    fusion = VariantFusion(8, 3, VariantSettings(gain=True, rescale=False))
    fusion.choose(w, 0.0)
    start = fusion.initial_bank(w)
    fusion.rescore(start, 0.0, reselect=False)
    plain = VariantFusion(8, 3, VariantSettings(rescale=False))
    plain.choose(w, 0.0)
    plain.rescore(w, 0.0, reselect=False)
    torch.testing.assert_close(fusion(start), plain(w))  # at first it computes what it would without gains
    torch.testing.assert_close(fusion(5 * start), plain(w))  # the bank's own lengths do not matter
    with torch.no_grad():
        fusion.gain *= 2
    torch.testing.assert_close(fusion(start), 2 * plain(w))
    fusion(start).sum().backward()
    assert (fusion.gain.grad != 0).all()


def test_learned_mixing_starts_at_p_gets_gradients_and_is_left_alone_by_scoring():
    w = bank(dtype=torch.float32)
    fusion = VariantFusion(8, 3, VariantSettings(learn_mixing=True))
    fusion.choose(w, 0.0)
    fusion.rescore(w, 0.0, reselect=False)
    fixed, _ = scored(w=w)
    torch.testing.assert_close(fusion.matrix.detach(), fixed.matrix)
    fusion(w).square().sum().backward()
    assert fusion.matrix.grad.abs().min() > 0
    with torch.no_grad():
        fusion.matrix += 0.1
    before = fusion.matrix.detach().clone()
    report = fusion.rescore(bank(seed=1, dtype=torch.float32), 1.0)
    assert torch.equal(fusion.matrix, before) and not fusion.is_frozen and report.churn == 0


def test_a_bank_may_be_larger_than_its_layer_and_start_orthogonal():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    settings = VariantSettings(bank=2.0, initial="orthogonal")
    torch.manual_seed(0)
    fused = apbm_core.fuse(model, torch.zeros(1, 3, 9, 9), 0.5, settings)
    start = fused[0].parametrizations.weight.original.detach()
    assert start.shape == (16, 3, 3, 3) and fused[0].weight.shape == (4, 3, 3, 3)
    unit = start.flatten(1) / start.flatten(1).norm(dim=1, keepdim=True)
    off_diagonal = unit @ unit.T - torch.eye(16)
    assert off_diagonal.abs().max() < 1e-5
    torch.testing.assert_close(start[:8].flatten(1).norm(dim=1), model[0].weight.detach().flatten(1).norm(dim=1))


def test_cosine_distance_ignores_length_and_knows_the_angle():
    weight = bank(4, 2, seed=4)
    scaled = weight * torch.tensor([1.0, 2.0, 0.1, 7.0], dtype=torch.float64).view(4, 1, 1, 1)
    torch.testing.assert_close(distances(scaled, "cosine"), distances(weight, "cosine"))
    cosine = torch.nn.functional.cosine_similarity(weight[0].flatten(), weight[1].flatten(), dim=0)
    torch.testing.assert_close(distances(weight, "cosine")[0, 1], (2 - 2 * cosine).sqrt())
