"""Slimming, fusing and compacting: against the dense network with its filters masked, on networks of many kinds."""

import pytest
import torch
import torchvision
from torch import nn

import apbm_core
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.fusion import fused_layers
from apbm_core.study.networks.models import build_model, prunable_convs
from apbm_core.surgery import prunable_layers, why_not_prunable

NETWORKS = {
    "resnet18": ("layer1.0.conv1", 8),
    "mobilenet_v2": ("features.3.conv.0.0", 20),
    "densenet121": ("features.denseblock1.denselayer1.conv1", 120),
    "vgg16_bn": ("features.0", 13),
}


FAST = [pytest.param(name, marks=() if name == "mobilenet_v2" else pytest.mark.slow) for name in NETWORKS]


def randomised(model: nn.Module) -> nn.Module:
    """Random BatchNorm statistics and scales, so that nothing cancels by symmetry."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def torchvision_net(name: str) -> nn.Module:
    options = {"width_mult": 0.5} if name.startswith("mobilenet") else {}
    return randomised(getattr(torchvision.models, name)(num_classes=7, **options))


def silenced(model: nn.Module, keep: dict[str, list[int]], x: torch.Tensor) -> torch.Tensor:
    """The dense network's logits when the channels of the filters that are not kept are cut where they are read.

    torch-pruning knows nothing of it: the channel is set to NaN behind its convolution, and each reader (the module
    that would turn NaN into NaN everywhere) is given 0 for it, found by running once and looking where NaNs arrive.
    """
    modules, handles = dict(model.named_modules()), []

    def poison(_module, _inputs, output, gone=None):
        output = output.clone()
        output[:, gone] = float("nan")
        return output

    def clean(_module, inputs):
        return (torch.where(torch.isnan(inputs[0]), 0.0, inputs[0]),)

    for name, kept in keep.items():
        gone = [i for i in range(modules[name].out_channels) if i not in kept]
        handles.append(modules[name].register_forward_hook(lambda m, i, o, g=gone: poison(m, i, o, g)))
    for module in model.modules():
        reads_all = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if reads_all:
            handles.append(module.register_forward_pre_hook(clean))
    try:
        with torch.no_grad():
            return model(x)
    finally:
        for handle in handles:
            handle.remove()


def choice(layers: dict[str, int]) -> dict[str, list[int]]:
    return {name: sorted(torch.randperm(n)[: max(1, n // 3)].tolist()) for name, n in layers.items()}


@pytest.mark.parametrize("name", FAST)
def test_slim_equals_the_dense_network_without_those_channels(name):
    model, x = torchvision_net(name), torch.randn(2, 3, 64, 64)
    layers = prunable_layers(model, x)
    keep = choice(layers)
    small = apbm_core.slim(model, x, keep)
    with torch.no_grad():
        torch.testing.assert_close(small(x), silenced(model, keep, x), rtol=1e-4, atol=1e-4)
    modules = dict(small.named_modules())
    assert all(modules[layer].out_channels == len(kept) for layer, kept in keep.items())


@pytest.mark.parametrize("name", FAST)
def test_fused_and_compacted_agree_on_networks_of_others(name):
    model, x = torchvision_net(name), torch.randn(2, 3, 64, 64)
    layer, count = NETWORKS[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    slim = apbm_core.fuse(model, x, keep=0.5, groups=False)
    names = [name for name, _, _ in fused_layers(slim)]
    assert layer in names and len(names) == count
    slim.train()
    slim(x).square().mean().backward()
    for _, conv, _ in fused_layers(slim):
        assert conv.parametrizations.weight.original.grad.abs().sum() > 0
    apbm_core.rescore(slim, progress=0.4)
    slim.eval()
    net = apbm_core.compact(slim)
    with torch.no_grad():
        torch.testing.assert_close(net(x), slim(x), rtol=1e-5, atol=1e-5)
    assert not any(True for _ in fused_layers(net))
    assert {type(m) for m in net.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert not any("parametriz" in key or "bank" in key for key in net.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # the original is intact


@pytest.mark.parametrize(
    "name",
    [pytest.param("vgg16", marks=pytest.mark.slow), "resnet20", pytest.param("resnet56", marks=pytest.mark.slow)],
)
def test_our_networks_prune_what_their_widths_tables_say(name):
    model, x = randomised(build_model(name)), torch.randn(2, 3, 32, 32)
    assert tuple(prunable_layers(model, x)) == prunable_convs(name)
    keep = choice(prunable_layers(model, x))
    small = apbm_core.slim(model, x, keep)
    with torch.no_grad():
        torch.testing.assert_close(small(x), silenced(model, keep, x), rtol=1e-4, atol=1e-4)
    rebuilt = build_model(name, widths=[len(keep[conv]) for conv in prunable_convs(name)])
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}


def test_the_bank_is_the_dense_filters_on_the_kept_inputs():
    model, x = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 2, 1)), torch.zeros(1, 3, 8, 8)
    slim = apbm_core.fuse(model, x, keep=0.25)
    layers = {name: (conv, fusion) for name, conv, fusion in fused_layers(slim)}
    first, second = layers["0"], layers["1"]
    bank = second[0].parametrizations.weight.original
    assert torch.equal(bank, model[1].weight[:, first[1].selected])
    assert second[0].weight.shape == (16, 16, 3, 3) and bank.shape == (64, 16, 3, 3)


def test_keep_may_name_layers_and_counts():
    model, x = build_model("resnet20"), torch.zeros(1, 3, 32, 32)
    slim = apbm_core.fuse(model, x, keep={"layer1.0.conv1": 3, "layer3.2.conv1": 0.25})
    assert {name: conv.weight.shape[0] for name, conv, _ in fused_layers(slim)} == {
        "layer1.0.conv1": 3,
        "layer3.2.conv1": 16,
    }
    every = apbm_core.fuse(model, x, keep=1.0, ignore=["layer1.0.conv1"], groups=False)
    layers = list(fused_layers(every))
    assert len(layers) == 8
    assert all(conv.weight.shape[0] == fusion.matrix.shape[1] for _, conv, fusion in layers)


def test_a_fused_network_learns_and_its_compact_one_predicts_the_same():
    torch.manual_seed(0)
    features = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)
    model = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y = torch.randn(32, 3, 8, 8), torch.arange(32) % 4
    slim = apbm_core.fuse(model, x, keep=0.5)
    optimizer = torch.optim.SGD(slim.parameters(), 0.1, momentum=0.9)
    losses = []
    for epoch in range(30):
        apbm_core.rescore(slim, epoch / 30)
        loss = nn.functional.cross_entropy(slim(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    slim.eval()
    torch.testing.assert_close(apbm_core.compact(slim)(x), slim(x), rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    """One convolution used twice: its outputs are its own inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.head(self.conv(self.conv(x)))


class TwoHeads(nn.Module):
    """A convolution that is read by a layer and returned as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        features = self.conv(x)
        return self.head(features), features


class HardCoded(nn.Module):
    """The number of channels is written into forward()."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6 * 36, 2)

    def forward(self, x):
        return self.head(self.conv(x).view(-1, 6 * 36))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Shared(), "calls it 2 times"),
        (TwoHeads(), "returns other shapes"),
        (HardCoded(), "does not run any more with fewer filters"),
        (nn.Sequential(nn.Conv2d(3, 6, 3)), "own output"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "no layer that others read"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 3)), "GroupNorm"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 3)), "grouped"),
    ],
)
def test_what_cannot_be_fused_is_declined_with_a_reason(network, words):
    with pytest.raises(UnsupportedNetwork, match=words):
        apbm_core.fuse(network, torch.randn(1, 3, 8, 8), groups=False)


def test_residual_stages_are_left_alone():
    reasons = why_not_prunable(Small(), torch.zeros(1, 3, 8, 8))
    assert reasons["inner"] is None
    for name in ("enter", "outer"):
        assert "coupled" in reasons[name]


@pytest.mark.parametrize("keep", [0, 0.0, 1.2, -0.5, float("nan"), True, "half", 65])
def test_impossible_shares_are_refused(keep):
    model, x = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 2, 1)), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="keep"):
        apbm_core.fuse(model, x, keep=keep)


class Small(nn.Module):
    """A layer that another one is added to, and one in between."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.outer, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.enter(x)
        return self.head(x + self.outer(self.inner(x).relu()))


def test_unknown_layers_and_bad_indices_are_named():
    model, x = Small(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ConfigError, match="'layer9'"):
        apbm_core.fuse(model, x, keep={"layer9": 0.5})
    with pytest.raises(ConfigError, match="'layer9'"):
        apbm_core.fuse(model, x, ignore=["layer9"])
    with pytest.raises(UnsupportedNetwork, match="'enter' cannot be fused: its outputs are coupled"):
        apbm_core.fuse(model, x, keep={"enter": 0.5}, groups=False)
    for indices, words in (([], "no filter"), ([0, 99], "0..15"), ([1, 1], "twice")):
        with pytest.raises(ConfigError, match=words):
            apbm_core.slim(model, x, {"inner": indices})
    fused = apbm_core.fuse(model, x)
    with pytest.raises(UnsupportedNetwork, match="compact"):
        apbm_core.fuse(fused, x)
    with pytest.raises(ConfigError, match="nothing to compact"):
        apbm_core.compact(model)
    with pytest.raises(UnsupportedNetwork, match="does not run on inputs"):
        apbm_core.fuse(model, torch.zeros(1, 5, 8, 8))


def test_frozen_parameters_stay_frozen():
    model, x = Small(), torch.zeros(1, 3, 8, 8)
    model.enter.weight.requires_grad_(False)
    slim = apbm_core.fuse(model, x)
    assert not slim.enter.weight.requires_grad and slim.outer.weight.requires_grad
