"""Narrowing by merging: exact where filters are copies, least squares otherwise, and a whole run that resumes."""

import math

import pytest
import torch
from fake_task import Interrupted, fake_task, interrupt
from torch import nn

from apbm_core.counting import count_parameters
from apbm_core.errors import ConfigError
from apbm_core.fusion import FusionSettings
from apbm_core.study.methods import apbm
from apbm_core.study.methods.narrowing import (
    choose_filters,
    fusion_shares,
    layer_redundancy,
    layer_scores,
    narrow,
    stage_widths,
)
from apbm_core.study.networks.chains import followers
from apbm_core.study.networks.models import build_model, dense_widths, prunable_convs
from apbm_core.study.training.hooks import Hook
from apbm_core.temperature import AnnealedTau

SHARP = FusionSettings(schedule=AnnealedTau(start=64, end=64))


def trained(name: str) -> nn.Module:
    """A network with norms as after some training: nothing at its initial value."""
    torch.manual_seed(0)
    model = build_model(name, 10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def keep_first_half(model: nn.Module, names) -> dict[str, list[int]]:
    return {name: list(range(model.get_submodule(name).out_channels // 2)) for name in names}


def make_second_half_copies(model: nn.Module, keep, factor: float = 1.0) -> None:
    """Channel m + k of each layer becomes ``factor`` times channel k: after the norm, so that kernels may differ."""
    chains = followers(model, keep)
    with torch.no_grad():
        for name, kept in keep.items():
            conv, norm = model.get_submodule(name), model.get_submodule(chains[name].norm)
            m = len(kept)
            tensors = [conv.weight, norm.running_mean, norm.running_var, *([] if conv.bias is None else [conv.bias])]
            for tensor in tensors:
                tensor[m : 2 * m] = tensor[:m].clone()
            for tensor in (norm.weight, norm.bias):
                tensor[m : 2 * m] = factor * tensor[:m].clone()


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_copies_are_merged_without_changing_the_function(name):
    model, x = trained(name), torch.randn(16, 3, 32, 32)
    keep = keep_first_half(model, prunable_convs(name)[:3])
    make_second_half_copies(model, keep)
    merged = narrow(model, x[:1], keep, SHARP, "similarity")
    cut = narrow(model, x[:1], keep, SHARP, "none")
    with torch.no_grad():
        torch.testing.assert_close(merged(x), model(x), rtol=1e-3, atol=1e-4)
        assert (cut(x) - model(x)).abs().max() > 0.01
    assert merged.get_submodule(prunable_convs(name)[0]).out_channels == len(keep[prunable_convs(name)[0]])


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_channels_that_others_predict_are_handed_over_to_them(name):
    model, x = trained(name), torch.randn(64, 3, 32, 32)
    keep = keep_first_half(model, [*prunable_convs(name)[:2], prunable_convs(name)[-1]])  # VGG's last feeds the linear
    make_second_half_copies(model, keep, factor=1.7)
    handed = narrow(model, x[:1], keep, SHARP, "activations", x)
    cut = narrow(model, x[:1], keep, SHARP, "none")
    with torch.no_grad():
        error, without = ((network(x) - model(x)).abs().mean() for network in (handed, cut))
    assert error < 0.02 * without  # the ridge keeps it from being exact


def test_merging_leaves_the_network_it_was_given_alone():
    model, x = trained("resnet20"), torch.randn(8, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in ("none", "similarity", "activations"):
        narrow(model, x[:1], keep_first_half(model, prunable_convs("resnet20")), FusionSettings(), merge, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shares_divide_every_filter_among_the_kept_ones():
    w = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = torch.tensor([0, 3])
    shares = fusion_shares(w, kept, FusionSettings(schedule=AnnealedTau(start=1.5, end=1.5)))
    flat = w.flatten(1)
    distance = torch.tensor([[(a - b).norm() for b in flat] for a in flat], dtype=torch.float64)
    distance /= distance.sum() / 30
    for j in range(6):
        if j in (0, 3):
            assert shares[:, j].tolist() == [float(j == 0), float(j == 3)]
            continue
        mass = [math.exp(-1.5 * math.log(6) * distance[j, k]) for k in (0, 3)]
        assert shares[:, j].tolist() == pytest.approx([value / sum(mass) for value in mass])


def test_redundancy_is_one_for_copies_and_falls_for_filters_that_differ():
    model = trained("resnet20")
    a, b = prunable_convs("resnet20")[:2]
    with torch.no_grad():
        model.get_submodule(a).weight[:] = 1.0
    same, different = layer_redundancy(model, [a, b], tau=2.0)
    n = model.get_submodule(b).out_channels
    assert same == pytest.approx(1.0)
    assert 1 / n < different < 0.5


def test_stages_go_down_geometrically_and_end_at_the_target():
    wide, target = {"a": 64, "b": 10}, {"a": 16, "b": 10}
    assert [stage_widths(wide, target, share)["a"] for share in (0.0, 0.5, 1.0)] == [64, 32, 16]
    assert stage_widths(wide, target, 0.5)["b"] == 10


def test_the_most_important_filters_are_chosen_at_the_last_temperature():
    model = trained("resnet20")
    name = prunable_convs("resnet20")[0]
    with torch.no_grad():
        model.get_submodule(name).weight[2:] = model.get_submodule(name).weight[2]  # only 0 and 1 are unlike the rest
    assert choose_filters(model, {name: 2}, FusionSettings()) == {name: [0, 1]}


@pytest.mark.parametrize("widths", ["shared", "entropy", "marginal"])
def test_a_narrowing_run_meets_its_target_and_resumes_as_if_undisturbed(tmp_path, widths):
    options = apbm.Options(passing=False, wide=0.5, stages=2, widths=widths)

    def run(folder, stop=None):
        task = interrupt(fake_task(folder, "apbm", "resnet20", options, epochs=4, target=0.5), stop)
        return apbm.prune(task), task

    whole, task = run(tmp_path / "whole")
    for stop in (1, 2, 3):  # in the first part, at its end, and in the third
        with pytest.raises(Interrupted):
            run(tmp_path / "resumed", stop)
    resumed, again = run(tmp_path / "resumed")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert again.notes == task.notes and bool(task.notes) == (widths != "shared")
    dense = count_parameters(build_model("resnet20", 10))
    assert 1 - count_parameters(whole) / dense == pytest.approx(0.5, abs=0.005)
    trained_phases = [(phase.name, phase.epochs) for phase in task.phases if phase.epochs]
    assert trained_phases == [("wide-1", 1), ("wide-2", 1), ("slim", 2)]
    rates = [row["lr"] for row in task.history]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True) and len(rates) == 4  # one course over all parts


def test_more_stages_than_epochs_are_refused_before_anything_is_trained(tmp_path):
    task = fake_task(
        tmp_path, "apbm", "resnet20", apbm.Options(passing=False, wide=0.5, stages=3), epochs=3, target=0.5
    )
    with pytest.raises(ConfigError, match="there are 3"):
        apbm.prune(task)
    assert task.phases == []
    with pytest.raises(ValueError, match="set wide"):
        apbm.Options(widths="entropy")
    with pytest.raises(ValueError, match="mac_weight belongs to the marginal widths"):
        apbm.Options(passing=False, wide=0.5, widths="entropy", mac_weight=1e-9)


def test_scores_for_widths_are_the_divergences_between_the_filters_distributions():
    """Against the definition, pair by pair: S_i = sum_k sum_j p_ij ln(p_ij / p_kj)."""
    conv = nn.Conv2d(3, 5, 3)
    (found,) = layer_scores(nn.Sequential(conv), ["0"], tau=0.8)
    filters = conv.weight.detach().double().flatten(1).tolist()
    distance = [[math.dist(a, b) for b in filters] for a in filters]
    mean = sum(map(sum, distance)) / (5 * 4)
    rows = [[math.exp(-0.8 * math.log(5) * d / mean) for d in row] for row in distance]
    p = [[value / sum(row) for value in row] for row in rows]
    expected = [sum(a * math.log(a / b) for other in p for a, b in zip(own, other, strict=True)) for own in p]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rule", ["marginal", "marginal-tied"])
def test_marginal_widths_keep_what_scores_most_for_its_price(tmp_path, rule):
    """The wide network's filters of three layers are all alike, so that their scores are 0: these layers go first."""
    options = apbm.Options(passing=False, wide=0.5, widths=rule, mac_weight=1e-12)
    task = fake_task(tmp_path, "apbm", "resnet20", options, epochs=2, target=0.5)
    alike = [name for name in task.widths if name.startswith("layer3")]

    class Alike(Hook):
        @torch.no_grad()
        def after_step(self, context):
            for name in alike:
                weight = context.model.get_submodule(name).weight
                weight.copy_(weight[:1].expand_as(weight))

    train = task.train
    task.train = lambda phase, *given, **more: train(
        phase, *given, **more | ({"hooks": [Alike()]} if phase == "wide-1" else {})
    )
    network = apbm.prune(task)
    kept = {name: network.get_submodule(name).out_channels for name in task.widths}
    dense = dict(zip(task.widths, dense_widths("resnet20"), strict=True))
    assert sum(kept[name] for name in alike) < sum(dense[name] for name in alike) / 2
    assert all(kept[name] >= dense[name] - 1 for name in kept if name not in alike)  # but for the last filter
    assert [task.notes["marginal_scores"][name] for name in alike] == pytest.approx([0.0] * 3, abs=1e-6)
    assert 1 - count_parameters(network) / count_parameters(build_model("resnet20", 10)) == pytest.approx(0.5, abs=0.01)
