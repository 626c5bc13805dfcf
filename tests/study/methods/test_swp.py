"""SWP: the update rule by hand, dead stripes that stay dead, exact counts, targets, and whole runs."""

from functools import partial

import pytest
import torch
from fake_task import fake_task
from torch import nn

from apbm_core.counting import count_macs, count_parameters
from apbm_core.errors import ConfigError
from apbm_core.study.methods import swp
from apbm_core.study.methods.swp import (
    FixedStripes,
    Options,
    ShrinkSkeletons,
    count_striped,
    cut,
    prune,
    stripe_scores,
    stripes_for_target,
)
from apbm_core.study.networks.models import build_model, cost_table, prunable_convs
from apbm_core.study.networks.stripes import StripeConv2d, add_skeletons, skeleton_layers, to_stripes, without_skeletons
from apbm_core.study.training.hooks import Context

IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.fixture
def make_task(tmp_path):
    return partial(fake_task, tmp_path)


def skeletons(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, _, layer in skeleton_layers(model)}


def context_of(model: nn.Module, **settings) -> Context:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **settings)
    return Context(model, optimizer, torch.device("cpu"), 1, 1)


def small_vgg() -> nn.Module:
    return add_skeletons(build_model("vgg16", widths=[4] * 13))


def test_update_equals_the_formula():
    model = small_vgg()
    layer = skeletons(model)["features.conv3"]
    with torch.no_grad():
        layer.skeleton.copy_(torch.rand(4, 3, 3) - 0.5)
        layer.skeleton[1, 0, 2], layer.skeleton[2, 1, 1] = 0.009, -0.011
    before = layer.skeleton.detach().clone()
    hook, context = ShrinkSkeletons(prunable_convs("vgg16"), alpha=0.25, delta=0.01), context_of(model)
    hook.start(context)
    for other in skeletons(model).values():
        other.skeleton.grad = torch.zeros_like(other.skeleton)
    gradient = torch.randn(4, 3, 3)
    layer.skeleton.grad = gradient.clone()
    hook.after_backward(context)
    for o in range(4):
        for i in range(3):
            for j in range(3):
                f, g = before[o, i, j].item(), gradient[o, i, j].item()
                alive = abs(f) > 0.01
                assert layer.mask[o, i, j].item() == alive
                assert layer.skeleton[o, i, j].item() == (f if alive else 0)
                expected = g + 0.25 * (1 if f > 0 else -1) if alive else 0
                assert layer.skeleton.grad[o, i, j].item() == pytest.approx(expected, abs=1e-6)
    assert not layer.mask[1, 0, 2] and layer.mask[2, 1, 1]


def test_momentum_does_not_wake_dead_stripes_and_their_filters_fall_silent():
    model = small_vgg().train()
    layer, norm = skeletons(model)["features.conv3"], model.features.norm3
    nn.init.ones_(norm.bias)
    hook, context = ShrinkSkeletons(prunable_convs("vgg16"), 1e-5, 0.01), context_of(model, momentum=0.9)
    hook.start(context)
    for step in range(4):
        if step == 2:  # by now the optimizer has momentum
            with torch.no_grad():
                layer.skeleton[1] = 0.001
        context.optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        hook.after_backward(context)
        context.optimizer.step()
        hook.after_step(context)
    assert not layer.mask[1].any() and (layer.skeleton[1] == 0).all()
    assert norm.weight[1] == 0 == norm.bias[1] and (norm.bias[[0, 2, 3]] != 0).all()
    assert hook.after_epoch(context) == {"stripes_alive": pytest.approx(1 - 9 / (13 * 36))}


def test_best_stripe_of_a_prunable_layer_never_dies():
    model = small_vgg()
    for layer in skeletons(model).values():
        nn.init.uniform_(layer.skeleton, 0, 0.005)
        layer.skeleton.grad = torch.zeros_like(layer.skeleton)
    best = {name: layer.skeleton.argmax().item() for name, layer in skeletons(model).items()}
    hook, context = ShrinkSkeletons(prunable_convs("vgg16"), 1e-5, 0.01), context_of(model)
    hook.start(context)
    hook.after_backward(context)
    assert {name: layer.mask.flatten().nonzero().tolist() for name, layer in skeletons(model).items()} == {
        name: [[index]] for name, index in best.items()
    }


def test_fixed_stripes_move_but_do_not_die():
    model = small_vgg()
    layer = skeletons(model)["features.conv2"]
    mask = torch.rand(4, 3, 3) < 0.5
    layer.set_mask(mask)
    hook, context = FixedStripes(prunable_convs("vgg16")), context_of(model)
    hook.start(context)
    with torch.no_grad():
        layer.skeleton.fill_(0.001)
    hook.after_step(context)
    assert torch.equal(layer.skeleton != 0, mask) and torch.equal(layer.mask, mask)


def test_scores_equal_loops():
    model = add_skeletons(build_model("resnet20"))
    for layer in skeletons(model).values():
        nn.init.normal_(layer.skeleton)
        layer.set_mask(torch.rand(layer.mask.shape) < 0.8)
    published, ours = stripe_scores(model), stripe_scores(model, "skeleton-norm")
    conv = model.layer1[0].conv1
    weight, layer = conv.parametrizations.weight.original.double(), skeletons(model)["layer1.0.conv1"]
    for o, i, j in [(0, 0, 0), (3, 2, 1), (15, 1, 2), (7, 0, 1)]:
        f = abs(layer.skeleton[o, i, j].item()) if layer.mask[o, i, j] else -torch.inf
        norm = sum(w**2 for w in weight[o, :, i, j].tolist()) ** 0.5
        assert published["layer1.0.conv1"][o, i, j].item() == pytest.approx(f)
        assert ours["layer1.0.conv1"][o, i, j].item() == pytest.approx(f * norm)


@pytest.mark.parametrize("name", ["vgg16", "resnet20"])
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_count_equals_the_striped_network(name, share):
    model = build_model(name)
    masks = {}
    for conv, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            masks[conv] = torch.rand(module.out_channels, 3, 3) < share
    emptied = list(masks)[5]
    masks[emptied][:] = False
    expected = count_striped(cost_table(name), masks)
    assert expected == count_parameters(to_stripes(model, IMAGE, masks))


def stripe_macs(striped: nn.Module) -> int:
    """Surviving stripes, their inputs and their output pixels, with the sizes measured in a forward pass."""
    total = 0

    def add(module, inputs, output):
        nonlocal total
        per_pixel = (
            len(module.weight) * module.in_channels if isinstance(module, StripeConv2d) else module.weight.numel()
        )
        total += per_pixel * output.shape[2:].numel()

    for module in striped.modules():
        if isinstance(module, (StripeConv2d, nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    striped.eval()(IMAGE)
    return total


@pytest.mark.parametrize(("name", "targets"), [("vgg16", [0.5, 0.9274]), ("resnet56", [0.4884, 0.75])])
@pytest.mark.parametrize("score", ["skeleton", "skeleton-norm"])
@pytest.mark.parametrize("is_trained", [False, True])
def test_target_is_met_on_the_striped_network(name, targets, score, is_trained):
    model = add_skeletons(build_model(name))
    dense = count_parameters(build_model(name))
    if is_trained:
        for layer in skeletons(model).values():
            nn.init.uniform_(layer.skeleton, 0, 1.5)
            layer.set_mask(layer.skeleton.detach() > 0.1)
    for target in targets:
        masks, delta = stripes_for_target(model, cost_table(name), target, score)
        assert 1 - count_striped(cost_table(name), masks) / dense == pytest.approx(target, abs=0.005)
        assert all(masks[conv].any() for conv in prunable_convs(name))
        for conv, layer in skeletons(model).items():
            assert not (masks[conv] & ~layer.mask).any()  # the dead do not come back
    if score == "skeleton" and is_trained:  # it is one delta for the whole network, but for the best stripes
        alive = {conv: layer.skeleton.abs() > delta for conv, layer in skeletons(model).items()}
        assert sum(int((masks[conv] != alive[conv]).sum()) for conv in masks) <= len(prunable_convs(name))


def test_striped_network_at_the_target_counts_what_it_should():
    model = add_skeletons(build_model("resnet20"))
    for layer in skeletons(model).values():
        nn.init.uniform_(layer.skeleton, 0, 1.5)
    masks, _ = stripes_for_target(model, cost_table("resnet20"), 0.7)
    striped = to_stripes(without_skeletons(model), IMAGE, masks)
    assert count_parameters(striped) == count_striped(cost_table("resnet20"), masks)
    assert count_macs(striped) == stripe_macs(striped)


def test_impossible_target_is_refused():
    with pytest.raises(ConfigError, match="is the most"):
        stripes_for_target(add_skeletons(build_model("resnet20")), cost_table("resnet20"), 0.999)


def test_cut_leaves_nothing_of_dead_filters_but_what_it_folds():
    """After the cut, removing the dead filters changes nothing; and the fold beats forgetting their constant."""
    model = add_skeletons(build_model("vgg16", widths=[6] * 13)).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.bias, 0.5, 1)
    masks = {name: torch.rand(layer.mask.shape) < 0.8 for name, layer in skeletons(model).items()}
    for mask in masks.values():
        mask[2] = False
    x = torch.randn(8, 3, 32, 32)
    for name, layer in skeletons(model).items():
        layer.set_mask(masks[name])
    masked = model(x)
    forgotten = to_stripes(without_skeletons(model), IMAGE, masks).eval()(x)
    cut(model, IMAGE, prunable_convs("vgg16"), masks)
    striped = to_stripes(without_skeletons(model), IMAGE, masks).eval()
    torch.testing.assert_close(striped(x), model(x), atol=1e-4, rtol=1e-4)
    assert (striped(x) - masked).abs().mean() < 0.5 * (forgotten - masked).abs().mean()


@pytest.mark.parametrize(("name", "target"), [("resnet20", 0.6), pytest.param("vgg16", 0.9274, marks=pytest.mark.slow)])
def test_run_meets_its_target(make_task, name, target):
    task = make_task("swp", name, Options(), epochs=3, target=target)
    network = prune(task)
    removed = 1 - count_parameters(network) / task.costs.parameters()
    assert removed == pytest.approx(target, abs=0.005)
    assert task.notes["target_deviation"] == pytest.approx(removed - target)
    assert [(p.name, p.epochs) for p in task.phases] == [("sparse", 2), ("score", 0), ("finetune", 1)]
    assert any(isinstance(module, StripeConv2d) for module in network.modules())


def test_interrupted_run_ends_with_the_same_network(make_task, tmp_path, monkeypatch):
    """Once in the training with fixed stripes, where only the checkpoint knows the masks."""
    options = Options(cut_at=0.25)
    whole = prune(fake_task(tmp_path / "other", "swp", "resnet20", options, epochs=4, target=0.6))
    fixed_stripes = swp.FixedStripes

    class Interrupted(fixed_stripes):
        def after_epoch(self, context):
            if context.epoch == 1:
                raise KeyboardInterrupt
            return super().after_epoch(context)

    Interrupted.__name__ = "FixedStripes"  # the checkpoint knows hooks by name
    monkeypatch.setattr(swp, "FixedStripes", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(make_task("swp", "resnet20", options, epochs=4, target=0.6))
    monkeypatch.setattr(swp, "FixedStripes", fixed_stripes)
    resumed = prune(make_task("swp", "resnet20", options, epochs=4, target=0.6))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_published_schedule_and_own_threshold(make_task):
    task = make_task("swp", "resnet20", Options(delta=0.999), epochs=2, target=0, schedule="published")
    network = prune(task)
    assert [(p.name, p.epochs) for p in task.phases] == [("sparse", 2), ("score", 0)]
    assert 0 < task.notes["stripes_kept"] < 1 and "target_deviation" not in task.notes
    stripes = sum(
        len(m.weight) if isinstance(m, StripeConv2d) else 9 * m.out_channels
        for m in network.modules()
        if isinstance(m, (StripeConv2d, nn.Conv2d))
    )
    assert stripes == round(task.notes["stripes_kept"] * 9 * (16 + 6 * (16 + 32 + 64)))


def test_search_for_alpha(make_task):
    task = make_task("swp", "resnet20", Options(reach="alpha", trials=2), epochs=1, target=0.5)
    prune(task)
    assert [p.name for p in task.phases] == ["search-1", "search-2", "sparse", "score"]
    assert task.notes["search_epochs"] == 2 and 1e-6 < task.notes["alpha"] < 1
