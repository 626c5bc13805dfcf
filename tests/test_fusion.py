"""The fusion parametrization: against the formula as a loop, finite differences, and its own promises."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import apbm_core
from apbm_core.errors import ApbmError, ConfigError
from apbm_core.fusion import FilterFusion, FusionSettings, fused_layers, mix, stable_slots
from apbm_core.similarity import log_similarity, pairwise_distances, relative_entropy, scale_free
from apbm_core.temperature import AnnealedTau, DcffTemperature


def bank(n=8, c=3, seed=0, dtype=torch.float64):
    return torch.randn(n, c, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scored(m=3, progress=0.0, w=None, **settings):
    w = bank() if w is None else w
    fusion = FilterFusion(len(w), m, FusionSettings(**settings)).to(w)
    fusion.choose(w, progress)
    fusion.rescore(w, progress, reselect=False)
    return fusion, w


def test_the_value_is_the_selected_rows_of_p_times_the_bank():
    fusion, w = scored(rescale=False, schedule=AnnealedTau(start=1.2, end=2))
    log_p = log_similarity(scale_free(pairwise_distances(w)), 1.2 * math.log(8))
    kept = sorted(relative_entropy(log_p).argsort(descending=True)[:3].tolist())
    assert fusion.selected.tolist() == kept
    for slot, filter_ in enumerate(kept):
        by_loop = sum(log_p[filter_, j].exp() * w[j] for j in range(8))
        torch.testing.assert_close(fusion(w)[slot], by_loop)


def test_gradients_reach_the_whole_bank_as_finite_differences_say():
    fusion, w = scored()
    leaf = w.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda b: (fusion(b) ** 2).sum(), (leaf,))
    (fusion(leaf) ** 2).sum().backward()
    assert (leaf.grad.flatten(1).norm(dim=1) > 0).all()  # the unimportant filters learn, too


def test_the_gradient_is_p_transposed_times_the_fused_gradient():
    fusion, w = scored()
    leaf = w.clone().requires_grad_()
    upstream = torch.randn(3, 3, 3, 3, dtype=torch.float64)
    fusion(leaf).backward(upstream)
    torch.testing.assert_close(leaf.grad.flatten(1), fusion.matrix.T @ upstream.flatten(1))


def test_rescaling_restores_the_mean_norm():
    fusion, w = scored(rescale=True)
    norm = w[fusion.selected].flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(fusion(w).flatten(1).norm(dim=1).mean(), norm)


def test_a_sharp_schedule_becomes_an_exact_selection():
    sharp = AnnealedTau(start=1, end=60, freeze=0.5)
    fusion, w = scored(schedule=sharp)
    assert not fusion.is_selection
    fusion.rescore(w, 0.5)
    assert fusion.is_selection and fusion.is_frozen
    assert torch.equal(fusion(w), w[fusion.selected])


def test_a_frozen_fusion_never_changes():
    fusion, w = scored(schedule=AnnealedTau(start=1, end=2, freeze=0.6))
    fusion.rescore(w, 0.59)
    assert not fusion.is_frozen
    fusion.rescore(w, 0.6)
    before = fusion.matrix.clone(), fusion.selected.clone()
    fusion.rescore(bank(seed=1), 0.9)
    assert torch.equal(fusion.matrix, before[0]) and torch.equal(fusion.selected, before[1])


@given(st.data())
def test_stable_slots_keep_whoever_stays_where_it_was(data):
    n = data.draw(st.integers(1, 12))
    m = data.draw(st.integers(1, n))
    before = torch.tensor(data.draw(st.permutations(range(n)))[:m])
    selected = torch.tensor(sorted(data.draw(st.permutations(range(n)))[:m]))
    after = stable_slots(before, selected)
    assert sorted(after.tolist()) == selected.tolist()
    for slot, filter_ in enumerate(before.tolist()):
        if filter_ in selected:
            assert after[slot] == filter_


def test_churn_is_the_share_of_newcomers():
    fusion, w = scored(m=4)
    w = w.clone()
    leaver = fusion.selected[0].item()
    w[leaver] = w.mean(0)  # the most ordinary filter there could be
    assert fusion.rescore(w, 0.1).churn == pytest.approx(1 / 4)
    assert leaver not in fusion.selected.tolist()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mixing_does_not_depend_on_the_memory_layout(layout):
    fusion, w = scored()
    expected = torch.einsum("mn,nchw->mchw", fusion.matrix, w)
    torch.testing.assert_close(mix(fusion.matrix, w.to(memory_format=layout)), expected)


def test_mixing_is_in_float32_under_autocast():
    fusion, w = scored(w=bank(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        fused = fusion(w)
    assert fused.dtype == torch.float32
    assert torch.equal(fused, fusion(w))


def test_state_dict_restores_a_fusion_exactly():
    model = apbm_core.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.zeros(1, 3, 9, 9))
    apbm_core.rescore(model, 0.3)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    fresh = apbm_core.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.zeros(1, 3, 9, 9))
    x = torch.randn(2, 3, 9, 9)
    assert not torch.equal(fresh(x), model(x))
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(fresh(x), model(x))
    (_, _, a), (_, _, b) = next(fused_layers(model)), next(fused_layers(fresh))
    assert a.last == b.last and a.is_selection == b.is_selection and a.is_frozen == b.is_frozen
    reports = apbm_core.rescore(model, 0.5), apbm_core.rescore(fresh, 0.5)
    assert reports[0] == reports[1]


def test_copies_are_independent():
    model = apbm_core.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.zeros(1, 3, 9, 9))
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 9, 9)
    before = model(x)
    apbm_core.compact(twin)
    nn.init.zeros_(twin[0].parametrizations.weight.original)
    assert torch.equal(model(x), before)


def test_dcff_temperatures_are_the_published_ones():
    """methods.md 1: 1, 4622, 7616, 9052 ... 1e4 over the first epochs."""
    schedule = DcffTemperature(epochs=300)
    temperatures = [schedule.temperature(epoch / 300, 64) for epoch in (0, 1, 2, 3, 300)]
    assert [round(t) for t in temperatures] == [1, 4622, 7616, 9052, 10000]


def test_annealed_tau_course():
    schedule = AnnealedTau(start=1, end=2, freeze=0.5)
    for progress, tau in ((0, 1), (0.25, 1.5), (0.5, 2), (0.9, 2)):
        assert schedule.temperature(progress, 64) == pytest.approx(tau * math.log(64))
    assert AnnealedTau(freeze=0).temperature(0.0, 64) == pytest.approx(2 * math.log(64))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="must not fall"):
        AnnealedTau(start=2, end=1)
    with pytest.raises(ValueError):
        FusionSettings(rescale="often")
    with pytest.raises(ValueError):
        FusionSettings(temperture=1)
    with pytest.raises(ConfigError, match="between 1 and 4"):
        FilterFusion(4, 5, FusionSettings())


def test_rescore_says_what_is_wrong():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(ApbmError, match="no fused layer"):
        apbm_core.rescore(model, 0.5)
    fused = apbm_core.fuse(model, torch.zeros(1, 3, 9, 9))
    with pytest.raises(ConfigError, match="1.5 is outside"):
        apbm_core.rescore(fused, 1.5)
    with torch.no_grad():
        fused[0].parametrizations.weight.original[0] = float("nan")
    with pytest.raises(ConfigError, match="NaN"):
        apbm_core.rescore(fused, 0.5)


def train_some_steps(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 9, 9, generator=generator)).square().mean().backward()
        optimizer.step()


def test_collapse_keeps_the_function_and_the_fused_momentum():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = apbm_core.fuse(net, torch.zeros(1, 3, 9, 9), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_some_steps(model, optimizer, 3, 0)
    apbm_core.rescore(model, 0.3)
    apbm_core.collapse(model, optimizer)
    assert len(model[0].parametrizations.weight.original) == 8  # P still changes: nothing happens
    apbm_core.rescore(model, 0.7)
    leaf, fusion = model[0].parametrizations.weight.original, model[0].parametrizations.weight[0]
    value, momentum = model[0].weight.detach().clone(), optimizer.state[leaf]["momentum_buffer"].clone()
    expected = mix(fusion.matrix, momentum)
    apbm_core.collapse(model, optimizer)
    assert model[0].parametrizations.weight.original is leaf and leaf.shape == (4, 3, 3, 3)
    assert torch.equal(model[0].weight, value)
    assert torch.equal(optimizer.state[leaf]["momentum_buffer"], expected)

    twin = apbm_core.compact(model)  # from here on it trains as the plain slim network would
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    names = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        source = names.get(name, leaf)
        plain.state[parameter]["momentum_buffer"] = optimizer.state[source]["momentum_buffer"].clone()
    train_some_steps(model, optimizer, 3, 1)
    train_some_steps(twin, plain, 3, 1)
    torch.testing.assert_close(model[0].weight.detach(), twin[0].weight.detach())
    assert not torch.equal(model[0].weight, value)


def test_collapse_while_the_last_loss_is_still_alive():
    """A loop keeps its last loss in a variable, and with it a graph that knows the bank's former shape."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model = apbm_core.fuse(net, torch.zeros(1, 3, 9, 9), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(4):
        apbm_core.rescore(model, epoch / 4)
        apbm_core.collapse(model, optimizer)
        loss = model(torch.randn(4, 3, 9, 9)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model[0].parametrizations.weight.original.shape == model[0].weight.shape == (4, 3, 3, 3)


def test_a_collapsed_network_can_be_loaded_into_a_fresh_one():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    fresh = apbm_core.fuse(net, torch.zeros(1, 3, 9, 9), 0.5)
    model = copy.deepcopy(fresh)
    apbm_core.rescore(model, 1.0)
    apbm_core.collapse(model)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(fresh(x), model(x)) and torch.equal(apbm_core.compact(fresh)(x), model(x))
    assert fresh[0].parametrizations.weight[0].is_collapsed


def test_a_network_laid_out_channels_last_can_be_fused():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 9, 9)
    slim = apbm_core.fuse(net, images)
    torch.testing.assert_close(apbm_core.compact(slim)(images), slim(images), rtol=1e-5, atol=1e-5)
