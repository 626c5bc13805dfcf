"""The cost table against closed forms written by hand, against networks that were really cut, and against counts."""

import copy

import pytest
import torch
import torchvision
from closed_forms import closed_form
from torch import nn

from apbm_core.costs import CostTable
from apbm_core.counting import count_macs, count_parameters
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.study.networks.models import build_model, cost_table, dense_widths
from apbm_core.surgery import slim


def random_widths(dense) -> list[int]:
    return [int(torch.randint(1, n + 1, ())) for n in dense]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg16", {}),
        ("vgg16", {"conv_bias": False}),
        ("resnet20", {}),
        ("resnet20", {"shortcut": "B"}),
        ("resnet56", {}),
    ],
)
def test_it_agrees_with_the_closed_forms_at_any_widths(name, options):
    costs = cost_table(name, 13, **options)
    for by, of in (("params", costs.parameters), ("macs", costs.macs)):
        count, expected = costs.size_function(by), closed_form(name, 13, by, **options)
        for widths in [dense_widths(name), *(random_widths(dense_widths(name)) for _ in range(50))]:
            assert count(widths) == of(dict(zip(costs.widths, widths, strict=True))) == expected(widths)


@pytest.mark.parametrize(("name", "options"), [("vgg16", {"conv_bias": False}), ("resnet20", {"shortcut": "B"})])
def test_it_agrees_with_networks_that_were_built(name, options):
    widths = random_widths(dense_widths(name))
    model, costs = build_model(name, 13, widths, **options), cost_table(name, 13, **options)
    assert costs.size_function("params")(widths) == count_parameters(model)
    assert costs.size_function("macs")(widths) == count_macs(model)


class Mixed(nn.Module):
    """What pruning meets elsewhere: concatenation, depthwise convolution, a flattened map, several norms and slopes."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 5, 1, bias=False)
        self.norm, self.slopes = nn.InstanceNorm2d(6, affine=True), nn.PReLU(5)
        self.depthwise = nn.Conv2d(11, 11, 3, stride=2, padding=1, groups=11)
        self.batch_norm, self.slope = nn.BatchNorm2d(11), nn.PReLU()
        self.middle, self.up = nn.Conv2d(11, 4, 1), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.last = nn.Conv2d(4, 7, 3, padding=1)
        self.classifier = nn.Linear(7 * 4 * 4, 3)

    def forward(self, x):
        x = torch.cat([self.norm(self.left(x)).relu(), self.slopes(self.right(x))], 1)
        x = self.slope(self.batch_norm(self.depthwise(x)))
        x = self.last(self.up(self.middle(x).relu()).relu()).relu()
        return self.classifier(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))


def assert_priced(model: nn.Module, image: torch.Tensor, costs: CostTable, widths: dict[str, int]) -> None:
    small = slim(model, image, {name: range(width) for name, width in widths.items()})
    assert costs.parameters(widths) == count_parameters(small)
    assert costs.macs(widths) == count_macs(small, image.shape[1:])


def test_it_prices_what_surgery_would_leave_of_an_unusual_network():
    model, image = Mixed(), torch.zeros(2, 3, 8, 8)
    state = copy.deepcopy(model.state_dict())
    costs = CostTable.trace(model, image)
    assert costs.widths == {"left": 6, "right": 5, "last": 7}
    assert costs.parameters() == count_parameters(model) and costs.macs() == count_macs(model, (3, 8, 8))
    assert_priced(model, image, costs, {"last": 2})
    for _ in range(5):
        assert_priced(model, image, costs, dict(zip(costs.widths, random_widths(costs.widths.values()), strict=True)))
    assert model.training and all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_it_prices_what_surgery_would_leave_of_torchvisions_networks(name):
    model, image = getattr(torchvision.models, name)(num_classes=5), torch.zeros(1, 3, 64, 64)
    costs = CostTable.trace(model, image)
    widths = dict(zip(costs.widths, random_widths(costs.widths.values()), strict=True))
    assert_priced(model, image, costs, widths)
    assert costs.size_function("macs")(list(widths.values())) == costs.macs(widths)


def test_frozen_weights_are_no_parameters_but_still_cost_time():
    model, image = Mixed(), torch.zeros(1, 3, 8, 8)
    model.right.weight.requires_grad_(False)
    model.last.bias.requires_grad_(False)
    model.batch_norm.requires_grad_(False)
    costs, widths = CostTable.trace(model, image), {"left": 2, "right": 3, "last": 5}
    small = slim(model, image, {name: range(width) for name, width in widths.items()})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert costs.parameters(widths) == sum(p.numel() for name, p in small.named_parameters() if name in trained)
    assert costs.macs(widths) == count_macs(small, (3, 8, 8))


def test_a_table_of_a_network_without_values_is_the_same():
    dense = Mixed()
    on_meta = CostTable.trace(copy.deepcopy(dense).to("meta"), torch.zeros(1, 3, 8, 8))
    costs, widths = CostTable.trace(dense, torch.zeros(1, 3, 8, 8)), {"left": 2, "last": 3}
    assert on_meta.layers == costs.layers
    assert (on_meta.parameters(widths), on_meta.macs(widths)) == (costs.parameters(widths), costs.macs(widths))


def test_stripes_replace_the_weights_of_their_layer_alone():
    costs = cost_table("resnet20", 10)
    widths = {"layer1.0.conv1": 5}
    stripes = {"layer1.0.conv1": 7, "layer1.0.conv2": 11}
    expected = costs.parameters(widths) - 5 * 9 * 16 + 7 * 16 - 16 * 9 * 5 + 11 * 5
    assert costs.parameters(widths, stripes) == expected


def test_what_is_read_twice_is_lost_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(12, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.first(x).relu()
            return self.last(self.second(torch.cat([x, x], 1)).relu())

    model, image = Twice(), torch.zeros(1, 3, 8, 8)
    assert_priced(model, image, CostTable.trace(model, image), {"first": 2, "second": 3})


@pytest.mark.parametrize("by", ["params", "macs"])
def test_a_size_function_knows_what_one_width_changes_and_some_of_the_widths(by):
    costs, names = cost_table("vgg16", 10), ["features.conv2", "features.conv3", "features.conv9"]
    assert set(names) < set(costs.widths)
    some, every = costs.size_function(by, names), costs.size_function(by)
    widths = random_widths([costs.widths[name] for name in names])
    assert some(widths) == every(list((costs.widths | dict(zip(names, widths, strict=True))).values()))
    for place, width in enumerate(random_widths(widths)):
        changed = [*widths[:place], width, *widths[place + 1 :]]
        assert some.change(widths, place, width) == some(changed) - some(widths)


def test_asking_for_a_size_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    cost_table("resnet20", 31)
    assert torch.equal(before, torch.get_rng_state())


def test_it_rejects_what_it_cannot_count():
    costs = cost_table("resnet20", 10)
    with pytest.raises(ConfigError, match="by is 'flops'"):
        costs.size_function("flops")
    with pytest.raises(ConfigError, match="no layer is called 'layer1'"):
        costs.size_function("macs", ["layer1"])
    with pytest.raises(ConfigError, match="2 numbers; this network takes 9"):
        costs.size_function()([3, 4])
    with pytest.raises(ConfigError, match="no layer is called 'layer1'"):
        costs.parameters({"layer1": 3})
    with pytest.raises(ConfigError, match="no option 'conv_bais'"):
        cost_table("vgg16", 10, conv_bais=False)
    with pytest.raises(UnsupportedNetwork, match="does not run on inputs of shape"):
        CostTable.trace(Mixed(), torch.zeros(1, 4, 8, 8))
