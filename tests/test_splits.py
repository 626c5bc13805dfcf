"""Channels that are split, concatenated, gated or shuffled, by sizes that a module remembers or works out, can go."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_surgery import randomised, silenced
from torch import nn
from torch.nn import functional as F

import apbm_core
from apbm_core.anatomy import Anatomy
from apbm_core.errors import ConfigError
from apbm_core.fusion import fused_layers

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class SplitConcat(nn.Module):
    """Half of the channels go through residual steps; every step is concatenated."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = conv(8, 12, 1), conv(24, 8, 1)
        self.steps = nn.ModuleList(conv(6, 6) for _ in range(2))

    def forward(self, x):
        parts = list(self.enter(x).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Ghost(nn.Module):
    """Half of the channels are made by a depthwise convolution from the other half, and added to a shortcut."""

    def __init__(self):
        super().__init__()
        self.first, self.cheap, self.shortcut = conv(8, 4, 1), conv(4, 4, groups=4), conv(8, 8, 1)
        self.width = 8

    def forward(self, x):
        y = self.first(x)
        return torch.cat([y, self.cheap(y)], 1)[:, : self.width] + self.shortcut(x)


class Partial(nn.Module):
    """A convolution of a quarter of the channels, whose sizes the module remembers."""

    def __init__(self, mode: str = "list"):
        super().__init__()
        self.part, self.rest, self.sizes, self.mode = 2, 6, (2, 6), mode
        self.mix, self.mlp = nn.Conv2d(2, 2, 3, padding=1), nn.Sequential(conv(8, 16, 1), nn.Conv2d(16, 8, 1))

    def forward(self, x):
        sizes = self.sizes if self.mode == "tuple" else [self.part, x.shape[1] - self.part]
        a, b = torch.split(x, [self.part, self.rest] if self.mode == "list" else sizes, 1)
        return x + self.mlp(torch.cat([self.mix(a), b], 1))


class Gate(nn.Module):
    """One half of the channels gates the other."""

    def __init__(self, split):
        super().__init__()
        self.wide, self.narrow, self.split = nn.Conv2d(8, 12, 1), nn.Conv2d(6, 8, 1), split

    def forward(self, x):
        return self.narrow(self.split(self.wide(x)))


def chunked(x):
    a, b = x.chunk(2, 1)
    return a * b.sigmoid()


class CrossStage(nn.Module):
    """A third of the channels is kept aside, by a size worked out from one that the module remembers."""

    def __init__(self):
        super().__init__()
        self.width, self.enter, self.inner = 12, conv(8, 12, 1), nn.Sequential(conv(8, 16), nn.Conv2d(16, 8, 1))
        self.leave = conv(12, 8, 1)

    def forward(self, x):
        a, b = self.enter(x).split([self.width // 3, self.width - self.width // 3], 1)
        return self.leave(torch.cat([a.relu(), b + self.inner(b)], 1))


class WithOtherNumbers(nn.Module):
    """Splits by a size that it remembers, beside numbers that happen to be the same and are none."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = conv(8, 12, 1), conv(12, 8, 1)
        self.width, self.sizes = 12, [4, 8]
        self.epochs_between, self.image_size, self.strides = 12, (8, 4), [4, 12]

    def forward(self, x):
        a, b = self.enter(x).split(self.sizes, 1)
        if self.training and self.epochs_between > 1000:
            raise AssertionError("not here")
        return self.leave(torch.cat([a.relu(), b], 1))


class ShuffledHalves(nn.Module):
    """ShuffleNet's second unit: half of the channels through a branch, both concatenated and shuffled."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(conv(4, 4, 1), conv(4, 4, groups=4), nn.Conv2d(4, 4, 1))

    def forward(self, x):
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Pixels(nn.Module):
    """Channels that become places, and places that become channels."""

    def __init__(self):
        super().__init__()
        self.wide, self.apart, self.back = nn.Conv2d(8, 24, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.back(F.pixel_unshuffle(self.apart(F.pixel_shuffle(self.wide(x), 2)), 2))


NETWORKS = {
    "split and concatenate": SplitConcat,
    "ghost": Ghost,
    "sizes in a list": Partial,
    "sizes in a tuple": lambda: Partial("tuple"),
    "one size is worked out": lambda: Partial("worked out"),
    "chunks that gate": lambda: Gate(chunked),
    "gated linear unit": lambda: Gate(lambda x: F.glu(x, 1)),
    "pixel shuffle": Pixels,
    "a third aside": CrossStage,
    "shuffled halves": ShuffledHalves,
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(nn.Sequential(conv(3, 8), NETWORKS[name](), NETWORKS[name](), nn.Conv2d(8, 2, 1)))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_is_the_dense_network_without_those_channels(name):
    model = network(name)
    anatomy, keep = Anatomy(model, IMAGES, True), {}
    left = {layer for layer, reason in anatomy.reasons.items() if reason and "depthwise" not in reason}
    assert left == {"3"}  # the output's
    for group in anatomy.groups.values():
        kept = torch.randperm(group.units)[: (group.units + 1) // 2]
        keep |= {layer: sorted(units[kept].flatten().tolist()) for layer, units in group.layers.items()}
    small = apbm_core.slim(model, IMAGES, keep, groups=True)
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    assert [small.get_submodule(layer).out_channels for layer in keep] == [len(kept) for kept in keep.values()]
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), silenced(model, keep, IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_it_trains_and_its_compact_network_computes_the_same(name):
    model = network(name)
    fused = apbm_core.fuse(model, IMAGES, 0.5)
    fused(IMAGES).square().mean().backward()
    assert all(module.parametrizations.weight.original.grad is not None for _, module, _ in fused_layers(fused))
    apbm_core.rescore(fused, progress=0.3)
    with torch.no_grad():
        net = apbm_core.compact(fused.eval())
        torch.testing.assert_close(net(IMAGES), fused(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_layer_of_which_a_unit_has_several_filters_is_asked_for_by_its_own_number():
    model = network("split and concatenate")
    units = {name: group for name, group in Anatomy(model, IMAGES, True).groups.items() if "1.enter.0" in group.layers}
    (group,) = units.values()
    assert {layer: tuple(channels.shape) for layer, channels in group.layers.items()} == {
        "1.enter.0": (6, 2), "1.steps.0.0": (6, 1), "1.steps.1.0": (6, 1),
    }  # fmt: skip
    for layer, count in (("1.enter.0", 4), ("1.steps.1.0", 2)):
        net = apbm_core.compact(apbm_core.fuse(model, IMAGES, {layer: count}))
        assert (net[1].enter[0].out_channels, net[1].steps[0][0].out_channels) == (4, 2)
    with pytest.raises(ConfigError, match=r"'1.enter.0' keeps 2 filters together; 3 is no multiple"):
        apbm_core.fuse(model, IMAGES, {"1.enter.0": 3})
    plan = {row["layer"]: row["kept"] for row in apbm_core.plan(model, IMAGES, min_filters=4).rows}
    assert (plan["1.enter.0"], plan["1.steps.0.0"]) == (8, 4)


def test_the_sizes_that_a_module_remembers_are_those_of_its_channels_and_the_dense_network_keeps_its_own():
    model = network("sizes in a list")
    net = apbm_core.compact(apbm_core.fuse(model, IMAGES, 0.5))
    assert (net[1].part + net[1].rest, net[1].mix.in_channels) == (4, net[1].part)
    assert (model[1].part, model[1].rest, model[1].sizes) == (2, 6, (2, 6))


def test_numbers_that_a_module_does_not_split_by_stay_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), WithOtherNumbers(), nn.Flatten(), nn.Linear(512, 4))
    get = vars(nn.Module).get("__getattribute__")
    compact = apbm_core.compact(apbm_core.fuse(randomised(model), keep=0.5, example_inputs=IMAGES))
    assert vars(nn.Module).get("__getattribute__") is get  # nothing is left of the watch
    slim = compact[1]
    assert slim.enter[0].out_channels < 12 and sum(slim.sizes) == slim.enter[0].out_channels
    assert (slim.epochs_between, slim.image_size, slim.strides, slim.width) == (12, (8, 4), [4, 12], 12)
    compact.train()(IMAGES)


def test_two_threads_may_fuse_at_once():
    def widths(_: int) -> list[int]:
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), WithOtherNumbers(), nn.Flatten(), nn.Linear(512, 4))
        slim = apbm_core.compact(apbm_core.fuse(model, keep=0.5, example_inputs=IMAGES))[1]
        return [*slim.sizes, slim.enter[0].out_channels]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(widths, range(4)))
    assert all(sum(sizes) == outputs < 12 for *sizes, outputs in found)
