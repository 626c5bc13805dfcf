"""Targets for any network: predicted sizes are those of the network that is cut, and plans say what is done."""

import pytest
import torch
from torch import nn

import apbm_core
from apbm_core.anatomy import Anatomy
from apbm_core.costs import CostTable
from apbm_core.counting import count_macs, count_parameters
from apbm_core.errors import ConfigError
from apbm_core.planning import units_for_target

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A sum, a depthwise and a grouped convolution, a gate, a transposed convolution, a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.inner, self.depthwise = nn.Conv2d(24, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.outer, self.gate = nn.Conv2d(32, 24, 1), nn.Linear(24, 24)
        self.grouped = nn.Conv2d(24, 16, 3, groups=4)
        self.up, self.group_norm = nn.ConvTranspose2d(16, 12, 2, 2), nn.GroupNorm(3, 12)
        self.side, self.last = nn.Conv2d(3, 8, 3), nn.Linear(12 + 8, 5)

    def forward(self, x):
        y = self.norm(self.stem(x)).relu()
        z = self.outer(self.depthwise(self.inner(y)).relu())
        y = y + z * self.gate(z.mean((2, 3))).sigmoid()[:, :, None, None]
        y = self.group_norm(self.up(self.grouped(y).relu()))
        return self.last(torch.cat([y.mean((2, 3)), self.side(x).mean((2, 3))], 1))


@pytest.fixture(scope="module")
def anatomy():
    torch.manual_seed(0)
    return Anatomy(Net(), IMAGES, True)


def cut(anatomy, units):
    return anatomy.cut({name: torch.arange(count) for name, count in units.items()})[0]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_sizes_are_those_of_the_network_that_is_cut(anatomy, share):
    assert set(anatomy.groups) == {"stem", "inner", "grouped", "up", "side"}
    units = {name: max(1, round(share * group.units)) for name, group in anatomy.groups.items()}
    costs, small = CostTable.of(anatomy), cut(anatomy, units)
    assert costs.parameters({}) == count_parameters(anatomy.model)
    assert costs.parameters(units) == count_parameters(small)
    assert costs.macs({}) == count_macs(anatomy.model, (3, 16, 16))
    assert costs.macs(units) == count_macs(small, (3, 16, 16))


@pytest.mark.parametrize("rule", ["uniform", "balanced", "entropy"])
@pytest.mark.parametrize("by", ["params", "macs"])
def test_targets_are_met_as_near_as_single_filters_go(anatomy, by, rule):
    size = count_parameters if by == "params" else lambda model: count_macs(model, (3, 16, 16))
    units = units_for_target(anatomy, list(anatomy.groups), 0.6, by, rule)
    removed = 1 - size(cut(anatomy, units)) / size(anatomy.model)
    assert 0.6 <= removed < 0.62
    for name, group in anatomy.groups.items():  # one unit more of any would be too much
        if units[name] < group.units:
            assert 1 - size(cut(anatomy, units | {name: units[name] + 1})) / size(anatomy.model) < 0.6


def test_fuse_takes_a_target():
    torch.manual_seed(0)
    model = Net()
    net = apbm_core.compact(apbm_core.fuse(model, IMAGES, target=0.7, ignore=["side"]))
    assert 0.7 <= 1 - count_parameters(net) / count_parameters(model) < 0.73 and net.side.out_channels == 8


def test_latency_is_a_target_too(anatomy, monkeypatch):
    from apbm_core import planning

    monkeypatch.setattr(
        planning, "_latency", lambda anatomy, units: 5 + CostTable.of(anatomy).macs(units)
    )  # a clock of its own
    units = units_for_target(anatomy, list(anatomy.groups), 0.5, "latency")
    macs = CostTable.of(anatomy).macs
    assert 0.5 <= 1 - macs(units) / macs({}) < 0.6


def test_a_plan_says_what_fuse_does_and_why_not(anatomy):
    model = anatomy.model
    plan = apbm_core.plan(model, IMAGES, 0.5, multiple=4)
    net = apbm_core.compact(apbm_core.fuse(model, IMAGES, 0.5, multiple=4))
    assert plan.parameters == (count_parameters(model), count_parameters(net))
    assert plan.macs == (count_macs(model, (3, 16, 16)), count_macs(net, (3, 16, 16)))
    rows = {row["layer"]: row for row in plan.rows}
    for name, row in rows.items():
        module = net.get_submodule(name)
        assert row["kept"] == (module.out_features if isinstance(module, nn.Linear) else module.out_channels)
    assert rows["outer"]["group"] == rows["gate"]["group"] == "stem" and rows["last"]["why not"]
    assert sum(row["MACs"] for row in plan.rows) == plan.macs[1]
    lines = str(plan).splitlines()
    assert lines[0].split()[:4] == ["layer", "group", "filters", "kept"] and "fewer" not in lines[-1]
    assert len(lines) == len(plan.rows) + 2 and f"{plan.parameters[1]:,} parameters" in lines[-1]
    frame = plan.frame()
    assert list(frame["layer"]) == list(rows)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"target": 1.0}, "above 0 and below 1"),
        ({"target": 0.5, "by": "size"}, "params, macs or latency"),
        ({"target": 0.5, "widths": "best"}, "uniform, balanced or entropy"),
        ({"target": 0.9999}, "the most that these layers give"),
        ({"keep": {"grouped": 5}}, "keeps 4 filters together"),
        ({"keep": {"stem": 3, "outer": 4}}, "tied to"),
        ({"min_filters": 0}, "min_filters"),
    ],
)
def test_what_cannot_be_is_refused_by_name(wrong, words):
    with pytest.raises(ConfigError, match=words):
        apbm_core.plan(Net(), IMAGES, **wrong)
