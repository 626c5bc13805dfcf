"""Passing the input on, against convolutions with impulses, finite differences, and torch's own dirac_."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from apbm_core.compress import compact, fuse
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.passing import InputPassing, identity_kernel, pass_inputs, start_as_identity, why_not_passing
from apbm_core.study.networks.models import build_model
from apbm_core.study.training.optimizer import parameter_groups
from apbm_core.study.training.recipes import get_recipe

CONVS = [
    nn.Conv2d(4, 4, 3, padding=1),
    nn.Conv2d(3, 6, 3, padding=1, bias=False),
    nn.Conv2d(6, 3, 3, stride=2, padding=1),
    nn.Conv2d(5, 5, 5, padding=2, stride=3),
    nn.Conv2d(4, 5, 1),
    nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
    nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    nn.Conv2d(6, 6, 3, padding=1, groups=3),
    nn.Conv2d(6, 6, 3, padding=1, groups=6),
]


@pytest.mark.parametrize("conv", CONVS, ids=repr)
def test_the_identity_kernel_passes_channels_on(conv):
    images = torch.randn(2, conv.in_channels, 9, 9)
    passed = F.conv2d(images, identity_kernel(conv), None, conv.stride, conv.padding, conv.dilation, conv.groups)
    both = min(conv.in_channels, conv.out_channels)
    assert torch.equal(passed[:, :both], images[:, :both, :: conv.stride[0], :: conv.stride[1]])
    assert not passed[:, both:].any()


def test_it_is_torchs_dirac():
    conv = nn.Conv2d(5, 8, 3, padding=1)
    assert torch.equal(identity_kernel(conv), nn.init.dirac_(torch.empty(8, 5, 3, 3)))
    grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2)
    assert torch.equal(identity_kernel(grouped), nn.init.dirac_(torch.empty(6, 3, 3, 3), groups=2))


def test_value_and_gradients():
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    passing = InputPassing(conv, amount=0.7)
    torch.testing.assert_close(passing(conv.weight), 0.5 * conv.weight + 0.7 * passing.delta)

    def call(filters, a, b):
        return torch.func.functional_call(passing, {"a": a, "b": b, "delta": passing.delta}, filters)

    values = [torch.randn(4, 3, 3, 3).double(), torch.randn(4, 1, 1, 1).double(), torch.randn(4, 1, 1, 1).double()]
    assert torch.autograd.gradcheck(call, [value.requires_grad_() for value in values])


@pytest.mark.parametrize("fused", [False, True])
def test_a_network_that_passes_on_is_written_out(fused):
    torch.manual_seed(0)
    model = build_model("vgg16", 10, [8] * 13)
    plain = {name: type(module) for name, module in model.named_modules()}
    if fused:
        model = fuse(model, torch.zeros(1, 3, 32, 32), 0.5)
    assert not pass_inputs(model)
    optimizer = torch.optim.SGD(parameter_groups(model, get_recipe("fast")), lr=0.1)
    before = model.features.conv3.weight.clone()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.randint(10, (8,))).backward()
        optimizer.step()
    assert not torch.equal(before, model.features.conv3.weight)
    images = torch.randn(4, 3, 32, 32)
    written = compact(model.eval())
    assert {name: type(module) for name, module in written.named_modules()} == plain
    torch.testing.assert_close(written(images), model(images))


def test_amounts_are_learned_without_decay():
    model = build_model("resnet20", 10)
    pass_inputs(model)
    decaying, spared = parameter_groups(model, get_recipe("fast"))
    amounts = {id(p) for module in model.modules() if isinstance(module, InputPassing) for p in module.parameters()}
    assert spared["weight_decay"] == 0 and {id(p) for p in spared["params"]} == amounts
    assert not amounts & {id(p) for p in decaying["params"]}


@pytest.mark.parametrize("start", ["replace", "add"])
def test_an_identity_start(start):
    conv = nn.Conv2d(3, 5, 3, padding=1)
    before = conv.weight.detach().clone()
    start_as_identity(conv, start, amount=2.0)
    delta = nn.init.dirac_(torch.empty(5, 3, 3, 3))
    kept = before * (torch.arange(5) >= 3).view(-1, 1, 1, 1) if start == "replace" else before
    torch.testing.assert_close(conv.weight.detach(), kept + 2 * delta)


def test_what_cannot_pass_on_says_why():
    assert "tap" in why_not_passing(nn.Conv2d(3, 3, 3, padding=4))
    assert "padding is 'same'" in why_not_passing(nn.Conv2d(3, 3, 3, padding="same"))
    assert "groups" in why_not_passing(nn.Conv2d(4, 8, 3, padding=1, groups=2))
    with pytest.raises(UnsupportedNetwork, match="cannot pass its input on"):
        InputPassing(nn.Conv2d(3, 3, 3, padding=4))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1, groups=2))
    assert list(pass_inputs(model)) == ["1"]
    assert parametrize.is_parametrized(model[0]) and not parametrize.is_parametrized(model[1])
    with pytest.raises(ConfigError, match="already"):
        pass_inputs(model)
    with pytest.raises(ConfigError, match="no convolution is called 'conv'"):
        pass_inputs(model, ["conv"])
