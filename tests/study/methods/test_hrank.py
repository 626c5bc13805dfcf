"""HRank against one ``torch.linalg.matrix_rank`` call a map, and the feature maps it sees on networks of all kinds."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.study.methods import hrank, l1
from apbm_core.study.networks.feature_maps import find_feature_maps, visit_feature_maps
from apbm_core.study.networks.models import build_model, prunable_convs


def rank_by_rank(maps):
    """The reference: one call of the library for each map."""
    flat = maps.reshape(-1, *maps.shape[-2:])
    return torch.tensor([int(torch.linalg.matrix_rank(one)) for one in flat]).reshape(maps.shape[:-2])


def images(n, size=32, seed=0):
    """Smooth blobs and noise, some images flat in part, so that maps of every rank occur."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 5, 5, generator=generator)
    result = F.interpolate(coarse, size=(size, size), mode="bilinear")
    result[::2] += 0.3 * torch.randn(result[::2].shape, generator=generator)
    result[::3, :, : size // 2] = 0.5
    return result


def settle(model, size=32):
    """Norm statistics as after training, so that activations are neither dead nor exploded."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train()(images(16, size, seed=1))
    return model


# --- ranks ---------------------------------------------------------------------------------------------------------


def maps_of_many_kinds(h, w):
    generator = torch.Generator().manual_seed(100 * h + w)
    normal = torch.randn(60, h, w, generator=generator)
    inner = max(1, min(h, w) // 2)
    low = torch.randn(60, h, inner, generator=generator) @ torch.randn(60, inner, w, generator=generator)
    u = torch.linalg.qr(torch.randn(60, h, h, generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(60, w, w, generator=generator).double()).Q
    spectrum = 10 ** (-9 * torch.rand(60, min(h, w), generator=generator).double())
    spectrum[:, 0] = 1  # the others lie on both sides of the tolerance and close to it
    near = (u[:, :, : min(h, w)] * spectrum[:, None]) @ v[:, : min(h, w)]
    return {
        "dense": normal,
        "ReLU": normal.relu(),
        "sparse": (normal - 1.3).relu(),
        "low rank": low,
        "low rank behind ReLU": low.relu(),
        "near the tolerance": near.float(),
        "rows of all sizes": normal.relu() * 10 ** (-12 * torch.rand(60, h, 1, generator=generator)),
        "columns of all sizes": normal.relu() * 10 ** (-12 * torch.rand(60, 1, w, generator=generator)),
        "all rows alike": normal.relu()[:, :1].expand(-1, h, -1),
        "whole numbers": torch.randint(0, 2, (60, h, w), generator=generator).float(),
        "zeros": torch.zeros(2, h, w),
        "tiny": normal.relu() * 1e-38,
        "huge": normal.relu() * 1e37,
    }


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (16, 16), (32, 32), (7, 3), (3, 7), (20, 17)]
)
def test_ranks_equal_a_loop_over_the_maps(shape):
    for kind, maps in maps_of_many_kinds(*shape).items():
        assert torch.equal(hrank.matrix_ranks(maps), rank_by_rank(maps)), kind


def test_ranks_in_other_precisions_and_shapes():
    maps = maps_of_many_kinds(6, 6)["sparse"]
    assert torch.equal(hrank.matrix_ranks(maps.double()), rank_by_rank(maps.double()))
    assert torch.equal(hrank.matrix_ranks(maps.bfloat16()), rank_by_rank(maps.bfloat16().float()))
    assert torch.equal(hrank.matrix_ranks(maps.reshape(3, 20, 6, 6)), rank_by_rank(maps).reshape(3, 20))
    strided = torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last).relu()
    assert torch.equal(hrank.matrix_ranks(strided), rank_by_rank(strided))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_refuse_maps_that_are_not_finite(bad, dtype):
    maps = torch.ones(3, 4, 4, dtype=dtype)
    maps[1, 2, 3] = bad
    with pytest.raises(ConfigError, match="NaN or infinite"):
        hrank.matrix_ranks(maps)


# --- scores --------------------------------------------------------------------------------------------------------


def outputs_of(model, modules, x):
    """The outputs of modules that are called once a pass, by plain hooks."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.clone()}))
        for name in modules
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["vgg16", "resnet56"])
def test_mean_ranks_equal_the_loop_on_real_activations(name):
    torch.manual_seed(0)
    model = settle(build_model(name))
    layers = prunable_convs(name)
    if name == "vgg16":
        layers = layers[1::3]
    else:
        layers = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.8.conv1", "layer3.8.conv2")
    x = images(3)
    got = hrank.mean_ranks(model, layers, x)
    relus = {layer: layer.replace("conv", "relu") for layer in layers}  # relu2 comes after the residual addition
    maps = outputs_of(model, relus.values(), x)
    for layer in layers:
        torch.testing.assert_close(got[layer], rank_by_rank(maps[relus[layer]]).double().mean(0), msg=layer)


def test_the_mean_is_over_all_images_whatever_the_batches(monkeypatch):
    torch.manual_seed(0)
    model = settle(build_model("resnet20"))
    x = images(7)
    whole = hrank.scores(model, ["layer2.0.conv1"], x)
    monkeypatch.setattr(hrank, "BATCH_SIZE", 3)
    torch.testing.assert_close(hrank.scores(model, ["layer2.0.conv1"], x), whole)


def test_the_l1_norm_breaks_ties_and_nothing_else():
    torch.manual_seed(0)
    model = settle(build_model("vgg16"))
    layer = "features.conv13"  # at 2x2 few ranks exist
    x = images(4)
    mean, score = hrank.mean_ranks(model, [layer], x)[layer], hrank.scores(model, [layer], x)[layer]
    norm = l1.scores(model, [layer])[layer]
    assert len(mean.unique()) < len(mean) / 10 and len(score.unique()) == len(score)
    assert ((score - mean >= 0) & (score - mean <= 1 / (2 * len(x)))).all()
    naive = sorted(range(len(mean)), key=lambda i: (mean[i].item(), norm[i].item()))
    assert torch.argsort(score).tolist() == naive


def test_scores_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model = build_model("resnet20").train()
    model.layer1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.random.get_rng_state()
    scores = hrank.scores(model, ["conv1", "layer3.2.conv2"], images(3), seed=0)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert scores["conv1"].shape == (16,) and scores["layer3.2.conv2"].shape == (64,)
    assert scores["conv1"].dtype == torch.float64


def test_a_failure_leaves_the_model_as_it_was_and_names_the_layer():
    torch.manual_seed(0)
    model = build_model("resnet20").train()
    model.layer2[0].norm1.bias.data[3] = float("nan")
    with pytest.raises(ConfigError, match=r"layer2\.0\.conv1.*NaN"):
        hrank.scores(model, ["layer2.0.conv1"], images(2))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()  # nothing watches on


@pytest.mark.parametrize("nothing", [None, torch.zeros(0, 3, 32, 32), torch.zeros(3, 32, 32)])
def test_scores_refuse_to_work_without_images(nothing):
    with pytest.raises(ConfigError, match=r"give a tensor of shape \(N, 3, H, W\)"):
        hrank.scores(nn.Sequential(nn.Conv2d(3, 2, 1)), ["0"], nothing)


def test_scores_refuse_unknown_layers_and_layers_without_a_map():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ConfigError, match="'conv' is not a convolution"):
        hrank.scores(Spare(), ["conv"], images(1))
    with pytest.raises(UnsupportedNetwork, match="'spare' is never called"):
        hrank.scores(Spare(), ["used", "spare"], images(1))


def test_a_network_whose_course_changes_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.passes = nn.Conv2d(3, 2, 1), 0

        def forward(self, x):
            self.passes += 1
            return (x * 2 if self.passes % 2 else self.conv(x).exp()) if self.passes > 1 else F.relu(self.conv(x))

    with pytest.raises(UnsupportedNetwork, match="'conv' appear"):
        hrank.scores(Fickle(), ["conv"], images(1))


# --- where the feature maps are ------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """One convolution for each way to meet an activation, or none."""

    def __init__(self):
        super().__init__()
        for name in ("functional", "inplace", "method", "shared_a", "shared_b", "added", "shortcut", "bare", "normed"):
            setattr(self, name, nn.Conv2d(3, 4, 1))
        self.depthwise = nn.Conv2d(4, 4, 1, groups=4)
        self.joined, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
        self.relu, self.norm = nn.ReLU(inplace=True), nn.BatchNorm2d(4)

    def forward(self, x):
        y = {
            "functional": F.gelu(self.functional(x)),
            "inplace": self.relu(self.inplace(x) * 1.0),
            "method": self.method(x).relu_(),
            "shared_a": self.relu(self.shared_a(x)),
            "shared_b": self.relu(self.shared_b(x)),
        }
        out = self.norm(self.added(x))
        out += self.norm(self.shortcut(x))
        y["added"] = y["shortcut"] = F.relu(out)
        bare = self.bare(x)
        y["bare"] = bare.clamp(min=0)
        y["depthwise"] = F.relu(self.depthwise(bare))
        normed = self.norm(self.normed(x))
        y["normed"] = normed.clamp(min=0)  # no activation function: the ReLU is ours
        joined = self.joined(x)
        y["joined"] = joined.clamp(min=0)
        y["last"] = torch.sigmoid(self.last(F.relu(torch.cat([normed, joined], 1))))
        self.expected = y
        return y["last"].mean((2, 3))


def test_each_convolution_is_followed_to_its_activation():
    torch.manual_seed(0)
    model, x, seen = Zoo().eval(), images(2, 8), {}
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    visit_feature_maps(model, layers, [x], lambda name, maps: seen.update({name: maps.clone()}))
    assert sorted(seen) == sorted(layers)
    for name in layers:
        torch.testing.assert_close(seen[name], model.expected[name], msg=name)


def test_a_convolution_read_by_another_gets_a_relu_of_its_own():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU())
    x, seen = images(2, 8), {}
    visit_feature_maps(net, ["0", "2", "3"], [x], lambda name, maps: seen.update({name: maps.clone()}))
    net.eval()
    torch.testing.assert_close(seen["0"], net[:2](x).relu())
    torch.testing.assert_close(seen["2"], net[:3](x).relu())
    torch.testing.assert_close(seen["3"], net(x))


BASIC = {f"layer{stage}.{block}.conv2": "relu" for stage in (1, 2, 3, 4) for block in (0, 1)}
NETWORKS = [
    ("resnet18", BASIC | {"conv1": "relu", "layer1.0.conv1": "relu", "layer2.0.downsample.0": "relu"}),
    (
        "mobilenet_v2",
        {"features.0.0": "hardtanh", "features.2.conv.1.0": "hardtanh", "features.2.conv.2": "batch_norm"},
    ),
]
HEAVY = [
    ("densenet121", {"features.conv0": "relu", "features.denseblock1.denselayer1.conv1": "relu",
                     "features.denseblock1.denselayer1.conv2": "conv2d"}),
    ("efficientnet_b0", {"features.0.0": "silu", "features.1.0.block.1.fc1": "silu",
                         "features.1.0.block.1.fc2": "sigmoid", "features.1.0.block.2.0": "batch_norm"}),
    ("convnext_tiny", {"features.0.0": "conv2d", "features.1.0.block.0": "conv2d"}),
    ("vgg16_bn", {"features.0": "relu", "features.40": "relu"}),
    ("regnet_y_400mf", {"stem.0": "relu", "trunk_output.block1.block1-0.f.c.0": "relu"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "functions"), NETWORKS + [pytest.param(*case, marks=pytest.mark.slow) for case in HEAVY]
)
def test_other_peoples_networks(name, functions):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    layers = [layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    found = find_feature_maps(model, layers, images(1, 64))
    assert {layer: found[layer].function for layer in functions} == functions
    scores = hrank.scores(model, layers, images(2, 64))
    for layer in layers:
        assert scores[layer].shape == (model.get_submodule(layer).out_channels,)
        assert torch.isfinite(scores[layer]).all() and (scores[layer] >= 0).all()
    if name == "resnet18":  # a block's second convolution and its shortcut share the map behind the addition
        assert found["layer2.0.conv2"] == found["layer2.0.downsample.0"]
