"""Counts against published numbers and against a count by forward hooks on real tensors."""

import copy
import warnings

import pytest
import torch
from closed_forms import closed_form
from torch import nn
from torch.nn.utils import parametrize

from apbm_core.counting import count_macs, count_parameters
from apbm_core.errors import ConfigError
from apbm_core.study.networks.models import build_model, dense_widths
from apbm_core.study.networks.published_widths import PUBLISHED_WIDTHS


def macs_by_hooks(model: nn.Module, input_shape=(3, 32, 32)) -> int:
    """Every output value of a convolution or linear layer costs one multiply-accumulate per input it sums over."""
    total = 0

    def add(module, args, output):
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        model.eval()(torch.zeros(1, *input_shape))
    return total


@pytest.mark.parametrize(
    ("name", "parameters", "mega_macs"), [("vgg16", 14_728_266, 313.20), ("resnet56", 853_018, 125.49)]
)
def test_dense_networks_have_the_published_size(name, parameters, mega_macs):
    model = build_model(name)
    assert count_parameters(model) == parameters
    assert round(count_macs(model) / 1e6, 2) == mega_macs


@pytest.mark.parametrize(
    ("name", "parameters", "mega_macs"),
    [("dcff-vgg16-cifar10", 1_071_248, 72.35), ("dcff-resnet56-cifar10", 384_316, 55.06)],
)
def test_dcff_networks_have_the_published_size(name, parameters, mega_macs):
    row = PUBLISHED_WIDTHS[name]
    model = build_model(row.model, row.num_classes, row.widths)
    assert count_parameters(model) == row.parameters == parameters
    assert round(count_macs(model) / 1e6, 2) == mega_macs


@pytest.mark.parametrize(
    ("name", "parameters", "removed"),
    [
        ("apbm-vgg16-cifar10", 1_069_272, "92.740%"),
        ("apbm-vgg16-cifar100", 4_001_916, "72.913%"),
        ("apbm-resnet56-cifar10", 436_372, "48.844%"),
        ("apbm-resnet56-cifar100", 479_392, "44.183%"),
    ],
)
def test_apbm_networks_remove_what_the_abstract_says(name, parameters, removed):
    row = PUBLISHED_WIDTHS[name]
    dense = count_parameters(build_model(row.model, row.num_classes))
    compact = count_parameters(build_model(row.model, row.num_classes, row.widths))
    assert compact == row.parameters == parameters
    assert f"{1 - compact / dense:.3%}" == removed


@pytest.mark.parametrize(
    ("name", "options"), [("vgg16", {"conv_bias": False}), ("resnet20", {}), ("resnet56", {"shortcut": "B"})]
)
def test_closed_forms_agree_with_built_networks(name, options):
    widths = [n - (3 * i) % 7 for i, n in enumerate(dense_widths(name))]
    model = build_model(name, 13, widths, **options)
    assert closed_form(name, 13, "params", **options)(widths) == sum(p.numel() for p in model.parameters())
    assert closed_form(name, 13, "macs", **options)(widths) == count_macs(model) == macs_by_hooks(model)


def test_other_layers_and_shapes():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 3, 5)
    )
    assert count_macs(model, (4, 9, 7)) == macs_by_hooks(model, (4, 9, 7)) == 8 * 4 * 3 * (2 * 9) + 96 * 5


def test_shared_and_frozen_parameters():
    first = nn.Linear(6, 6)
    model = nn.Sequential(first, first, nn.Linear(6, 2))
    assert count_parameters(model) == 6 * 6 + 6 + 6 * 2 + 2
    model[2].bias.requires_grad_(False)
    assert count_parameters(model) == 6 * 6 + 6 + 6 * 2


class Mix(nn.Module):
    """A parametrization that makes 3 filters out of 8 and refuses to work without values."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.rand(3, 8))

    def forward(self, bank):
        assert bank.isfinite().all().item()
        return (self.matrix @ bank.flatten(1)).unflatten(1, bank.shape[1:])


def mixed_network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
    parametrize.register_parametrization(model[0], "weight", Mix(), unsafe=True)
    return model


def test_parametrised_network_counts_as_the_small_one_it_computes():
    small = nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1))
    model = mixed_network()
    assert count_macs(model) == count_macs(copy.deepcopy(model)) == macs_by_hooks(small)
    assert count_parameters(model) == count_parameters(small) + (8 - 3) * 27  # the bank has five filters more


def test_counting_leaves_the_model_as_it_was():
    model = mixed_network().train()
    model[1].eval()
    images = torch.randn(2, 3, 6, 6)
    logits = model(images)
    logits.sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    count_macs(model)
    assert parametrize.is_parametrized(model[0], "weight")
    assert torch.equal(model(images), logits)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.requires_grad
        assert torch.equal(parameter.grad, gradient)


def test_meta_and_half_precision_networks_count_the_same():
    model = build_model("resnet20")
    expected = macs_by_hooks(copy.deepcopy(model))
    assert count_macs(copy.deepcopy(model).to("meta")) == expected
    assert count_macs(copy.deepcopy(model).to(torch.bfloat16)) == expected


def test_compiled_network_is_counted_without_compiling_it():
    def backend(graph, inputs):
        raise AssertionError("compiled")

    with warnings.catch_warnings(action="error"):
        assert count_macs(torch.compile(nn.Conv2d(3, 2, 1), backend=backend)) == 32 * 32 * 3 * 2


def test_network_in_training_mode_is_counted_in_evaluation_mode():
    # BatchNorm refuses to train on the single value per channel that one image leaves here.
    assert count_macs(nn.Sequential(nn.Conv2d(3, 4, 32), nn.BatchNorm2d(4)).train()) == 4 * 3 * 32 * 32


@pytest.mark.parametrize("shape", [(), (3, 0, 32), (3, 32.5, 32)])
def test_impossible_input_shapes_are_named(shape):
    with pytest.raises(ConfigError, match="input_shape"):
        count_macs(nn.Conv2d(3, 2, 1), shape)
