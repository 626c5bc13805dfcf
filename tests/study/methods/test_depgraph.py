"""DepGraph and global L1 against torch-pruning, and as whole runs that meet their target."""

import pytest
import torch
import torch_pruning
from fake_task import fake_task
from torch import nn

from apbm_core.counting import count_parameters
from apbm_core.errors import ConfigError
from apbm_core.study.methods import default_methods, get_method, global_l1
from apbm_core.study.methods.depgraph import GroupSparsity, importances
from apbm_core.study.networks.models import build_model, prunable_convs
from apbm_core.study.training.hooks import Context


def reference(model: nn.Module, layers: list[str], strength: float) -> torch_pruning.pruner.GroupNormPruner:
    """torch-pruning's own pruner of the same groups."""
    others = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and n not in layers]
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer="max")
    example = torch.zeros(1, 3, 32, 32)
    return torch_pruning.pruner.GroupNormPruner(
        model, example, importance, reg=strength, global_pruning=True, ignored_layers=others
    )


def random_network(name: str) -> nn.Module:
    model = build_model(name, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.grad = torch.zeros_like(parameter)
    return model


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_importances_and_gradients_are_those_of_torch_pruning(name):
    model, layers = random_network(name), prunable_convs(name)
    pruner = reference(model, layers, strength=0.3)
    names = {module: layer for layer, module in model.named_modules()}
    theirs = {names[group[0].dep.target.module]: pruner.estimate_importance(group) for group in pruner._groups}
    ours = importances(model, layers)
    assert list(ours) == list(layers) and theirs.keys() == ours.keys()
    for layer, values in ours.items():
        assert torch.allclose(values, theirs[layer], rtol=1e-5)

    pruner.regularize(model)
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad.zero_()
    context = Context(model, None, torch.device("cpu"), epochs=1, steps_per_epoch=1)
    GroupSparsity(layers, 0.3).after_backward(context)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    assert any(gradient.any() for gradient in wanted)


def test_equal_groups_are_pulled_alike():
    model, layers = random_network("resnet20"), prunable_convs("resnet20")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    GroupSparsity(layers, 1.0).after_backward(Context(model, None, torch.device("cpu"), 1, 1))
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_global_l1_scores_are_torch_prunings_by_the_mean_of_the_layer():
    model, layers = random_network("resnet20"), prunable_convs("resnet20")
    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.zeros(1, 3, 32, 32))
    importance = torch_pruning.importance.MagnitudeImportance(p=1, normalizer="mean", group_reduction="first")
    for layer, values in global_l1.scores(model, layers).items():
        conv = model.get_submodule(layer)
        group = graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, list(range(conv.out_channels)))
        assert torch.allclose(values.float(), importance(group), rtol=1e-5)


@pytest.mark.parametrize("method", ["depgraph", "global_l1"])
def test_a_run_meets_its_target_with_widths_of_its_own(method, tmp_path):
    options = get_method(method).Options()
    task = fake_task(tmp_path, method, "resnet20", options, epochs=3, target=0.6, images=16)
    small = get_method(method).prune(task)
    assert abs(1 - count_parameters(small) / task.costs.parameters() - 0.6) < 0.005
    assert sum(phase.epochs for phase in task.phases) == 3 and task.phases[0].shared
    widths = [small.get_submodule(name).out_channels for name in prunable_convs("resnet20")]
    assert len({round(width / full, 2) for width, full in zip(widths, [16] * 3 + [32] * 3 + [64] * 3, strict=True)}) > 2
    assert get_method(method).chooses_widths and method not in default_methods()
    with pytest.raises(ConfigError, match="needs a target"):
        get_method(method).prune(fake_task(tmp_path / "none", method, "resnet20", options, 2, 0.0))


def test_dcff_goes_through_its_published_epochs_in_the_runs_own(tmp_path):
    """Compressed, the averaging of the published first epoch lasts a 300th of the training."""

    def course(**options):
        given = get_method("dcff").Options(**options)
        task = fake_task(tmp_path / str(options), "dcff", "resnet20", given, epochs=3, target=0.5, images=16)
        get_method("dcff").prune(task)
        return [row["fusion"]["temperature"] for row in task.history]

    as_published, compressed = course(), course(compress=True)
    assert as_published[0] == 1 and compressed[0] > 9_999  # after the last scoring of the first epoch
    assert (
        "compress" not in fake_task(tmp_path, "dcff", "resnet20", get_method("dcff").Options(), 1, 0.5).config.options
    )
