"""Who can be done without: against brute force by matrix inversion, and where the answer is known."""

import pytest
import torch
import torchvision
from test_trained import combinations, flattening, images, lively, plain
from torch import nn

from apbm_core import redundancy, trained
from apbm_core.anatomy import Anatomy
from apbm_core.errors import ConfigError
from apbm_core.handover import Reader
from apbm_core.planning import wanted_units
from apbm_core.redundancy import RIDGE, Reading, least_missed_first
from apbm_core.study.networks.models import build_model
from apbm_core.trained import departures, fuse_trained, see


def drawn(units: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moments of correlated channels, their squares and a reader's gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(units, units, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, units, generator=generator, dtype=torch.float64)
    moments = causes @ torch.diag(torch.linspace(1, 0.02, units).double()) @ causes.T
    return moments, moments.diagonal() + 0.3, weight.T @ weight


def error(moments, squares, gram, left) -> float:
    """The mean square of what the reader's answers lack if these units predict all, by the normal equations."""
    ridge = RIDGE * squares.mean() * torch.eye(len(left), dtype=torch.float64)
    solved = torch.linalg.lstsq(moments[left][:, left] + ridge, moments[left]).solution
    return torch.trace(gram @ (moments - moments[:, left] @ solved)).item() / torch.trace(gram @ moments).item()


def test_each_time_the_unit_goes_without_which_the_errors_are_least():
    parts = [drawn(9, 4, 0), drawn(9, 7, 1)]
    order = least_missed_first([Reading(*part) for part in parts], until=2)
    left = list(range(9))
    for step in range(7):
        after = {unit: sum(error(*part, [u for u in left if u != unit]) for part in parts) for unit in left}
        gone = min(after, key=after.get)
        assert order[gone] == step
        left.remove(gone)
    assert sorted(torch.nonzero(order == 9)[:, 0].tolist()) == sorted(left)


def test_the_costs_are_what_the_errors_grow_by_when_several_go_at_once():
    part = drawn(8, 5, 2)
    reading, left = Reading(*part), [0, 2, 4, 5, 7]
    reading.remove(torch.tensor([1, 3, 6]))
    before = error(*part, left)
    grown = [error(*part, [u for u in left if u != unit]) - before for unit in left]
    torch.testing.assert_close(reading.costs()[left], torch.tensor(grown, dtype=torch.float64))


def test_units_of_a_wide_group_go_several_at_a_time(monkeypatch):
    monkeypatch.setattr(redundancy, "_AT_ONCE", 3)
    order = least_missed_first([Reading(*drawn(10, 4, 3))], until=3)
    assert sorted(order.tolist()) == [0] * 4 + [1] * 3 + [10] * 3


@pytest.mark.parametrize("widest", [4096, 40])
def test_channels_that_the_others_determine_go_and_nothing_is_lost(widest, monkeypatch):
    """Multiples of others, some of them large: relative entropy, which sees weights alone, keeps those."""
    monkeypatch.setattr(trained, "_WIDEST", widest)
    model = flattening()
    combinations(model, 0, [0], [1, 2, 3, 5])  # and filter 4, which is like none
    combinations(model, 2, [1], [0, 2, 4, 5])  # and 3, 6, 7
    x, counts = images(256, 8), {"0": 2, "2": 4}
    off = {}
    for choose in ("weights", "responses"):
        small = fuse_trained(model, x[:2], list(x.split(64)), keep=counts, choose=choose)
        assert (small[0].out_channels, small[2].out_channels) == (2, 4)
        with torch.no_grad():
            off[choose] = ((small(x) - model(x)).abs().mean() / model(x).abs().mean()).item()
    assert off["responses"] < 0.02  # the ridge
    assert off["weights"] > 5 * off["responses"]


def test_a_reader_sums_over_the_channels_of_a_unit_and_the_places_of_a_channel():
    """Units of two channels of three places each, against a loop over all of them."""
    generator = torch.Generator().manual_seed(5)
    read, layer = torch.randn(50, 12, generator=generator), nn.Linear(12, 4)
    reader = Reader(places=3, centred=True)
    reader.read(read, -1)
    inputs = torch.tensor([[3, 4, 5, 6, 7, 8], [0, 1, 2, 9, 10, 11]])
    (reading,) = reader.readings(layer, inputs)
    channels = read.double().view(50, 4, 3).transpose(1, 2).flatten(0, 1)
    weight = layer.weight.detach().double().view(4, 4, 3)
    moments, squares, gram = torch.zeros(2, 2), torch.zeros(2), torch.zeros(2, 2)
    for i, a in enumerate([(1, 2), (0, 3)]):
        for k in range(2):
            squares[i] += channels[:, a[k]].square().mean()
            for j, b in enumerate([(1, 2), (0, 3)]):
                both = torch.stack([channels[:, a[k]], channels[:, b[k]]])
                moments[i, j] += torch.cov(both, correction=0)[0, 1]
                gram[i, j] += (weight[:, a[k]] * weight[:, b[k]]).sum()
    for got, expected in ((reading.moments, moments), (reading.squares, squares), (reading.gram, gram)):
        torch.testing.assert_close(got.float(), expected.float(), rtol=1e-4, atol=1e-5)
    assert reader.readings(layer, inputs[:, :4]) == []  # a part of a channel's places


def dense() -> nn.Module:
    return torchvision.models.DenseNet(growth_rate=8, block_config=(3, 3), num_init_features=16, num_classes=10)


@pytest.mark.parametrize(
    "build", [lambda: build_model("resnet20", 10), dense, lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5)]
)
def test_the_inputs_of_a_unit_are_those_that_stay_with_it(build):
    """Of each group in turn, against what a cut leaves of the layers that read it."""
    torch.manual_seed(0)
    anatomy = Anatomy(lively(build()), images(4), coupled=True)
    readers = see(anatomy, list(anatomy.groups), [images(32)])
    read = 0
    for name, group in anatomy.groups.items():
        kept = torch.arange(0, group.units, 3)
        _, cuts = anatomy.cut({name: kept})
        for layer in readers:
            inputs = trained._of_units(group, layer)
            left = cuts.get(f"{layer}.weight", (None, None))[1]
            assert (inputs is None) == (left is None), (name, layer)
            if inputs is not None:  # a layer may read other groups' channels beside this one's
                gone = set(range(anatomy.model.get_submodule(layer).weight.shape[1])) - set(left.tolist())
                assert gone == set(inputs.flatten().tolist()) - set(inputs[kept].flatten().tolist())
                read += 1
    assert read >= len(anatomy.groups)
    orders = departures(anatomy, wanted_units(anatomy, 0.5), readers)
    assert set(orders) == set(anatomy.groups)


def test_a_unit_in_groups_counts_by_what_its_groups_lose_together():
    """A grouped convolution against as many that read their channels side by side."""
    first, grouped = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 9, 3, groups=3)
    model = plain(first, nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(9, 2, 1))
    x = images(32, 12)
    anatomy = Anatomy(model, x, coupled=True)
    (order,) = departures(anatomy, {"0": 1}, see(anatomy, ["0"], [x])).values()
    parts = []
    for group, weight in enumerate(grouped.weight.detach().double().chunk(3)):
        reader = Reader(centred=True)
        reader.read(torch.relu(first(x)).detach().chunk(3, 1)[group], 1)
        weight = weight.transpose(0, 1).flatten(1)
        moments = reader.moments / reader.count - torch.outer(reader.total, reader.total) / reader.count**2
        parts.append((moments, reader.moments.diagonal() / reader.count, weight @ weight.T))
    left = [0, 1, 2, 3]  # each unit is one channel of each group
    whole = [torch.trace(gram @ moments).item() for moments, _, gram in parts]
    for step in range(3):
        after = {
            unit: sum(
                error(*part, [u for u in left if u != unit]) * size for part, size in zip(parts, whole, strict=True)
            )
            for unit in left
        }
        gone = min(after, key=after.get)
        assert order[gone] == step
        left.remove(gone)


def test_where_nothing_can_take_over_the_weights_choose():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)

    model = plain(nn.Conv2d(3, 8, 3), nn.ReLU(), Scaled(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x = images(32, 8)
    anatomy = Anatomy(model, x, coupled=True)
    units = wanted_units(anatomy, 0.5)
    assert "0" in units and "0" not in departures(anatomy, units, see(anatomy, units, [x]))
    by_weights, by_responses = (fuse_trained(model, x, [x], choose=choose) for choose in ("weights", "responses"))
    assert torch.equal(by_weights[0].weight, by_responses[0].weight)


def test_a_choice_that_is_neither_is_refused():
    model, x = plain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), images(4, 8)
    with pytest.raises(ConfigError, match="choose is 'entropy'; who stays is chosen by 'weights' or 'responses'"):
        fuse_trained(model, x, [x], choose="entropy")
