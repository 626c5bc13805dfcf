"""Fusing a trained network: against least squares by torch, against update_bn, and on networks of many kinds."""

import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.models.convnext import CNBlockConfig

from apbm_core import trained
from apbm_core.anatomy import Anatomy
from apbm_core.errors import ConfigError
from apbm_core.fusion import FusionSettings
from apbm_core.handover import Reader
from apbm_core.planning import wanted_units
from apbm_core.study.networks.models import build_model
from apbm_core.surgery import slim
from apbm_core.trained import fuse_trained, hand_over


def images(count: int = 64, size: int = 32, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, channels, size // 4, size // 4, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")


def lively(model: nn.Module) -> nn.Module:
    """Norms that have seen something and scale their channels differently, as a trained network's do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(images())
    return model.eval()


def plain(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.reset_parameters()
    return nn.Sequential(*layers).eval()


def cut(model: nn.Module, kept: dict[str, list[int]], batches, recalibrate: bool = True) -> nn.Module:
    anatomy = Anatomy(model, batches[0], coupled=True)
    indices = {name: torch.tensor(units) for name, units in kept.items()}
    return hand_over(anatomy, indices, batches, recalibrate=recalibrate)


@pytest.mark.parametrize("bias", [True, False])
def test_the_next_layer_gets_the_least_squares_solution(bias):
    """Against torch.linalg.lstsq over every image and place, with a column of ones where there is a bias."""
    model = plain(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 4, 1, bias=bias), nn.Flatten(), nn.Linear(4 * 36, 5))
    x, kept, lost = images(32, 8), [1, 2, 5, 7], [0, 3, 4, 6, 8, 9]
    small = cut(model, {"0": kept}, [x])
    with torch.no_grad():
        a = model[1](model[0](x)).transpose(0, 1).flatten(1).T.double()
        given = torch.cat([a[:, kept], torch.ones(len(a), int(bias), dtype=a.dtype)], 1)
        shares = torch.linalg.lstsq(given, a[:, lost]).solution
        weight = model[2].weight[:, :, 0, 0].double()
        best = weight[:, kept] + weight[:, lost] @ shares[: len(kept)].T
        torch.testing.assert_close(small[2].weight[:, :, 0, 0].double(), best, rtol=0.02, atol=2e-3)  # a ridge
        if bias:
            expected = model[2].bias.double() + weight[:, lost] @ shares[len(kept)]
            torch.testing.assert_close(small[2].bias.double(), expected, rtol=0.02, atol=2e-3)


def flattening() -> nn.Module:
    """Two convolutions, and a layer that reads the places of a map."""
    return plain(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 7),
    )  # fmt: skip


def combinations(model: nn.Module, first: int, kept: list[int], lost: list[int]) -> None:
    """Make lost filters positive multiples of kept ones: so are their answers, behind a ReLU."""
    with torch.no_grad():
        for place, gone in enumerate(lost):
            for tensor in (model[first].weight, model[first].bias):
                tensor[gone] = (0.5 + place) * tensor[kept[place % len(kept)]]


@pytest.mark.parametrize("widest", [4096, 40])
def test_nothing_is_lost_where_the_lost_channels_are_multiples_of_the_kept(widest, monkeypatch):
    """Through a convolution, and through a flattened map: whole, and with the places of a channel together."""
    monkeypatch.setattr(trained, "_WIDEST", widest)
    model = flattening()
    combinations(model, 0, [0, 4], [1, 2, 3, 5])
    combinations(model, 2, [1, 3, 6], [0, 2, 4, 5, 7])
    x, kept = images(256, 8), {"0": [0, 4], "2": [1, 3, 6]}
    small = cut(model, kept, list(x.split(64)))
    assert small[0].out_channels == 2 and small[5].in_features == 3 * 16
    with torch.no_grad():
        error = (small(x) - model(x)).abs().mean()
        without = (slim(model, x, kept)(x) - model(x)).abs().mean()
    assert error < 0.02 * without  # the ridge


def test_a_flattened_map_too_large_whose_places_go_one_by_one_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(trained, "_WIDEST", 8)
    model = plain(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    x, kept = torch.randn(64, 5), {"0": [0, 3, 4, 9]}
    small = cut(model, kept, [x])
    torch.testing.assert_close(small[2].weight, model[2].weight[:, kept["0"]])


def test_norms_are_measured_as_torch_does():
    model = lively(torchvision.models.resnet18(num_classes=5))
    batches = list(images(48, 32).split(16))
    small = fuse_trained(model, batches[0][:1], batches, keep=0.5)
    again = fuse_trained(model, batches[0][:1], batches, keep=0.5)
    update_bn(batches, again)
    for (name, value), other in zip(small.named_buffers(), dict(again.named_buffers()).values(), strict=True):
        torch.testing.assert_close(value, other, msg=name)
    assert {norm.momentum for norm in small.modules() if isinstance(norm, nn.BatchNorm2d)} == {None}  # the model's own


def residual() -> nn.Module:
    return build_model("resnet20", 10)


def dense() -> nn.Module:
    return torchvision.models.DenseNet(growth_rate=8, block_config=(3, 3), num_init_features=16, num_classes=10)


def in_groups() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=8)


def with_layer_norms() -> nn.Module:
    blocks = [CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 2)]
    return torchvision.models.ConvNeXt(blocks, layer_scale=1.0, num_classes=10)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    pixels = torch.as_tensor(found.images, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 8 - 1
    return nn.functional.interpolate(pixels, scale_factor=2, mode="bilinear"), torch.as_tensor(found.target)


def learned(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("build", [residual, dense, in_groups, with_layer_norms])
def test_a_network_that_has_learnt_keeps_more_of_it_than_by_the_same_cut(build, digits):
    """Of all groups, shortcuts included; the same filters, the norms measured on the same images in both."""
    x, y = digits
    torch.manual_seed(0)
    model = learned(build(), x[:1300], y[:1300])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = list(x[:1280].split(128))
    small = fuse_trained(model, x[:2], batches, keep=0.5, choose="weights")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    anatomy = Anatomy(model, x[:2], coupled=True)
    only_cut, _ = anatomy.cut(trained.most_important(anatomy, wanted_units(anatomy, 0.5), FusionSettings()))
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in only_cut.state_dict().items()}
    update_bn(batches, only_cut)
    by_responses = fuse_trained(model, x[:2], batches, keep=0.5)
    with torch.no_grad():
        accuracy = {
            name: (net.eval()(x[1300:]).argmax(1) == y[1300:]).float().mean().item()
            for name, net in (("model", model), ("fused", small), ("cut", only_cut), ("by responses", by_responses))
        }
    assert accuracy["model"] > 0.8, accuracy
    assert accuracy["fused"] > accuracy["cut"] + 0.05, accuracy
    assert accuracy["by responses"] > max(accuracy["fused"] - 0.02, accuracy["cut"] + 0.05), accuracy


def test_batches_may_have_labels_be_dicts_or_have_several_parts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x, scale=1.0):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))) * scale)

    torch.manual_seed(0)
    model, x, scale, labels = Two(), torch.randn(64, 4), torch.rand(64, 1), torch.zeros(64)
    alone = fuse_trained(model, x, [x])
    for batches in ([(x, labels)], [[x, labels]]):
        assert torch.equal(fuse_trained(model, x, batches).head.weight, alone.head.weight)
    both = fuse_trained(model, (x, scale), [(x, scale, labels)])
    by_name = fuse_trained(model, {"x": x, "scale": scale}, [{"x": x, "scale": scale, "labels": labels}])
    assert torch.equal(both.head.weight, by_name.head.weight)
    assert not torch.equal(both.head.weight, alone.head.weight)
    with pytest.raises(ConfigError, match="lacks scale"):
        fuse_trained(model, {"x": x, "scale": scale}, [{"x": x}])
    with pytest.raises(ConfigError, match="1 parts; the example inputs have 2"):
        fuse_trained(model, (x, scale), [(x,)])


def test_the_first_batches_are_looked_at_once_and_no_more():
    model, x = plain(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), images(64, 8)
    given = []

    def endless():
        while True:
            for batch in x.split(8):
                given.append(len(batch))
                yield batch, torch.zeros(8)

    small = fuse_trained(model, x[:1], endless(), samples=60)
    assert sum(given) == 64
    torch.testing.assert_close(small[2].weight, fuse_trained(model, x[:1], [x], samples=1)[2].weight)
    with pytest.raises(ConfigError, match="samples is 0; look at one at least"):
        fuse_trained(model, x[:1], [x], samples=0)


def test_batches_that_cannot_serve_are_refused():
    model, x = plain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)), images(4, 8)
    with pytest.raises(ConfigError, match="there are no batches"):
        fuse_trained(model, x, [])
    with pytest.raises(ConfigError, match="'3' reads values that are not finite"):
        fuse_trained(model, x, [x / 0])
    tiny = plain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(ConfigError, match="give larger ones"):
        fuse_trained(tiny, images(2, 4)[..., :3, :3], [images(1, 4)[..., :3, :3]])


class Apart(nn.Module):
    """A grouped convolution written out as convolutions side by side."""

    def __init__(self, grouped: nn.Conv2d):
        super().__init__()
        self.parts = nn.ModuleList()
        for weight, bias in zip(
            *(t.detach().chunk(grouped.groups) for t in (grouped.weight, grouped.bias)), strict=True
        ):
            part = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:])
            part.load_state_dict({"weight": weight, "bias": bias})
            self.parts.append(part)

    def forward(self, x):
        return torch.cat([part(y) for part, y in zip(self.parts, x.chunk(len(self.parts), 1), strict=True)], 1)


def test_a_convolution_in_groups_takes_over_as_its_parts_would():
    first, grouped, last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 9, 3, groups=3), nn.Conv2d(9, 2, 1)
    model = plain(first, nn.ReLU(), grouped, nn.ReLU(), last)
    apart = nn.Sequential(first, nn.ReLU(), Apart(grouped), nn.ReLU(), last)
    x = images(16, 12)
    torch.testing.assert_close(apart(x), model(x))
    anatomy = Anatomy(model, x, coupled=True)
    assert anatomy.groups["0"].units == 4 and anatomy.groups["2"].units == 3
    small = cut(model, {"0": [1, 3], "2": [0, 2]}, [x])
    side_by_side = cut(apart, {"0": [1, 3], **{f"2.parts.{part}": [0, 2] for part in range(3)}}, [x])
    torch.testing.assert_close(small(x), side_by_side(x))
    only_cut, _ = anatomy.cut({"0": torch.tensor([1, 3]), "2": torch.tensor([0, 2])})
    assert not torch.allclose(small[2].weight, only_cut[2].weight)


def test_what_computes_by_itself_does_without():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)

    model = plain(nn.Conv2d(3, 8, 3), nn.ReLU(), Scaled(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x, kept = images(16, 8), torch.arange(0, 8, 2)
    anatomy = Anatomy(model, x, coupled=True)
    small = hand_over(anatomy, {"0": kept}, [x])
    expected, _ = anatomy.cut({"0": kept})
    assert torch.equal(small[2].weight, expected[2].weight)


def test_a_layer_may_be_given_its_input_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(input=torch.relu(self.first(input=x)))

    torch.manual_seed(0)
    model, x = Named(), torch.randn(64, 4)
    same = plain(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    same.load_state_dict(dict(zip(same.state_dict(), model.state_dict().values(), strict=True)))
    expected = cut(same, {"0": [0, 2, 5]}, [x])[2]
    torch.testing.assert_close(cut(model, {"first": [0, 2, 5]}, [x]).head.weight, expected.weight)


def test_a_transposed_convolution_takes_over_as_well():
    model = plain(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 2, 4, stride=2, padding=1))
    combinations(model, 0, [0, 4], [1, 2, 3, 5])
    x, kept = images(64, 8), {"0": [0, 4]}
    small = cut(model, kept, [x])
    with torch.no_grad():
        error = (small(x) - model(x)).abs().mean()
        without = (slim(model, x, kept, groups=True)(x) - model(x)).abs().mean()
    assert error < 0.02 * without


def test_what_is_read_in_bfloat16_is_summed_in_more():
    torch.manual_seed(0)
    read = torch.randn(20000, 6).to(torch.bfloat16)
    reader = Reader()
    reader.read(read, -1)
    torch.testing.assert_close(reader.moments, read.double().T @ read.double(), rtol=1e-4, atol=1e-2)
