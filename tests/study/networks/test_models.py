"""The CIFAR networks against torchvision's layers, published counts and torch-pruning; and one file more."""

import sys

import pytest
import torch
import torch_pruning
from torch import nn
from torchvision.models import vgg
from torchvision.models.resnet import BasicBlock as TorchvisionBlock

from apbm_core.counting import count_macs, count_parameters
from apbm_core.errors import ConfigError
from apbm_core.study import networks
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.networks.models import (
    all_networks,
    build_model,
    check_model,
    check_training_side,
    cost_table,
    dense_widths,
    network_label,
    prunable_convs,
)
from apbm_core.study.networks.resnet import BasicBlock, PadShortcut
from apbm_core.study.networks.widths import solve_model_widths
from apbm_core.study.report.frames import label_model


def randomise_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)


def test_vgg16_features_compute_what_torchvisions_vgg16_bn_computes():
    reference = vgg.make_layers(vgg.cfgs["D"], batch_norm=True).eval()
    randomise_norms(reference)
    model = build_model("vgg16").eval()
    ours, theirs = model.features.state_dict(), reference.state_dict()
    model.features.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = reference(images).flatten(1)
        torch.testing.assert_close(model.features(images).flatten(1), expected)
        torch.testing.assert_close(model(images), model.classifier(expected))


@pytest.mark.parametrize(("stride", "c_in", "c_out"), [(1, 16, 16), (2, 16, 32)])
def test_option_b_block_computes_what_torchvisions_basic_block_computes(stride, c_in, c_out):
    downsample = None
    if stride == 2:
        downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
    reference = TorchvisionBlock(c_in, c_out, stride, downsample).eval()
    randomise_norms(reference)
    block = BasicBlock(c_in, c_out, c_out, stride, "B").eval()
    block.load_state_dict(dict(zip(block.state_dict(), reference.state_dict().values(), strict=True)))
    x = torch.randn(2, c_in, 9, 9)
    torch.testing.assert_close(block(x), reference(x))


@pytest.mark.parametrize("side", [8, 9])
def test_option_a_shortcut_is_a_strided_identity_convolution(side):
    kernel = torch.zeros(32, 16, 1, 1)
    kernel[range(8, 24), range(16)] = 1.0
    x = torch.randn(2, 16, side, side)
    torch.testing.assert_close(PadShortcut(16, 32, 2)(x), nn.functional.conv2d(x, kernel, stride=2))


@pytest.mark.parametrize("name", list(all_networks()))
def test_widths_follow_prunable_convs_and_every_relu_is_its_own_module(name):
    dense = dense_widths(name)
    widths = [n - 1 - i % 3 for i, n in enumerate(dense)]
    model = build_model(name, 7, widths).eval()
    assert [model.get_submodule(conv).out_channels for conv in prunable_convs(name)] == widths
    calls = []
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    for relu in relus:
        relu.register_forward_hook(lambda module, args, out: calls.append(module))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert len(calls) == len(set(calls)) == len(relus) == {"vgg16": 13}.get(name, 2 * len(dense) + 1)


@pytest.mark.parametrize(("name", "depth"), [("resnet20", 20), ("resnet56", 56), ("resnet110", 110)])
def test_resnets_have_as_many_weighted_layers_as_their_name_says(name, depth):
    layers = [module for module in build_model(name).modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_weights_are_kaiming_normal_and_follow_torchs_seed():
    torch.manual_seed(3)
    model = build_model("resnet56")
    weight = model.layer3[4].conv2.weight.detach()
    assert weight.mean().abs() < 0.001
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    torch.manual_seed(3)
    assert torch.equal(build_model("resnet56").layer3[4].conv2.weight, weight)
    assert not torch.equal(build_model("resnet56").layer3[4].conv2.weight, weight)


def test_torch_pruning_slims_blocks_of_an_option_a_resnet():
    # In float64: 27 residual additions without trained BatchNorm statistics magnify float32's rounding.
    model = build_model("resnet56").double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    reference = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = {"layer1.0": [0, 3], "layer2.0": [1, 5, 31], "layer3.8": list(range(40))}
    graph = torch_pruning.DependencyGraph().build_dependency(model, images)
    for block, filters in pruned.items():
        conv = model.get_submodule(f"{block}.conv1")
        graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, filters).prune()
    assert [model.get_submodule(f"{block}.conv1").out_channels for block in pruned] == [14, 29, 24]

    # A pruned filter is one whose normalised output is 0 everywhere, so the dense network with those is the same.
    dense = build_model("resnet56").double().eval()
    dense.load_state_dict(reference)
    for block, filters in pruned.items():
        norm = dense.get_submodule(f"{block}.norm1")
        norm.weight.data[filters] = 0.0
        norm.bias.data[filters] = 0.0
    with torch.no_grad():
        torch.testing.assert_close(model(images), dense(images))


@pytest.mark.parametrize("side", [28, 31, 64])
def test_vgg16_rejects_images_that_do_not_end_in_one_pixel(side):
    with pytest.raises(ConfigError, match=rf"{side}x{side}.*32 to 63"):
        build_model("vgg16", widths=[1] * 13)(torch.zeros(1, 3, side, side))


def test_vgg16_takes_other_images_that_end_in_one_pixel():
    model = build_model("vgg16", 5, widths=[2] * 13).eval()
    assert model(torch.zeros(1, 3, 63, 40)).shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "vgg19"}, "'vgg19'.*did you mean 'vgg16'.*resnet110.*vgg16"),
        ({"name": "vgg16", "num_classes": 0}, "num_classes is 0"),
        ({"name": "vgg16", "num_classes": True}, "num_classes is True"),
        ({"name": "vgg16", "widths": [64] * 12}, "12 numbers.*13"),
        ({"name": "vgg16", "widths": 64}, "13 filter counts"),
        ({"name": "vgg16", "widths": [64, 65, *[64] * 11]}, r"features\.conv2 is 65.*1 to 64"),
        ({"name": "resnet20", "widths": [16, 16, 0, *[16] * 6]}, r"layer1\.2\.conv1 is 0.*1 to 16"),
        ({"name": "resnet20", "widths": [16, 7.0, *[16] * 7]}, r"layer1\.1\.conv1 is 7\.0"),
        ({"name": "resnet20", "shortcut": "C"}, "shortcut is 'C'.*'A', 'B'"),
        ({"name": "resnet20", "conv_bias": True}, "no option 'conv_bias'.*'shortcut'"),
        ({"name": "vgg16", "conv_bias": 1}, "conv_bias is 1; choose one of True, False"),
    ],
)
def test_impossible_arguments_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        build_model(**arguments)


def test_check_model_accepts_what_build_model_builds():
    check_model("resnet20", 100, {"shortcut": "B"})
    assert build_model("resnet20", 100, shortcut="B").layer2[0].shortcut.conv.weight.shape == (32, 16, 1, 1)


def test_the_prunable_convolutions_are_vgg16s_all_and_the_first_of_every_resnet_block():
    assert prunable_convs("vgg16") == tuple(f"features.conv{i}" for i in range(1, 14))
    for name, blocks in [("resnet20", 3), ("resnet56", 9), ("resnet110", 18)]:
        expected = tuple(f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(blocks))
        assert prunable_convs(name) == expected
        assert dense_widths(name) == (16,) * blocks + (32,) * blocks + (64,) * blocks


SMALL = """
from torch import nn
from apbm_core.study.networks.definition import Network

class Small(nn.Module):
    def __init__(self, num_classes, widths):
        super().__init__()
        (a, b) = widths
        self.conv1, self.norm1 = nn.Conv2d(3, a, 3, stride=2, bias=False), nn.BatchNorm2d(a)
        self.conv2, self.norm2 = nn.Conv2d(a, b, 3, stride=2), nn.BatchNorm2d(b)
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(2), nn.Linear(4 * b, num_classes)

    def forward(self, x):
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        return self.classifier(self.pool(x).flatten(1))

NETWORKS = {"small": Network(label="Small Net", module=Small, widths=(12, 20), sides=(16, 64), needs="a map is left")}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A file more in the folder of the networks, as far as the import system can tell."""
    (tmp_path / "small.py").write_text(SMALL)
    monkeypatch.setattr(networks, "__path__", [*networks.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop(f"{networks.__name__}.small", None)


def test_a_further_file_is_a_further_network(small):
    assert "small" in all_networks() and network_label("small") == "Small Net" and network_label("gone") == "gone"
    assert prunable_convs("small") == ("conv1", "conv2") and dense_widths("small") == (12, 20)
    assert build_model("small", 7, [3, 4])(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    check_training_side("small", 16)
    with pytest.raises(ConfigError, match="small .* crops of 15 pixels: so that a map is left, it takes 16 to 64"):
        check_training_side("small", 15)


def test_a_further_network_has_a_size_widths_that_meet_a_target_and_runs_in_a_study(small):
    assert network_label("small") == label_model("small") == "Small Net"
    widths = dict(zip(prunable_convs("small"), solve_model_widths("small", 7, 0.5).widths, strict=True))
    model = build_model("small", 7, list(widths.values()))
    dense = count_parameters(build_model("small", 7))
    assert cost_table("small", 7).parameters(widths) == count_parameters(model)
    assert 1 - count_parameters(model) / dense == pytest.approx(0.5, abs=0.02)
    assert cost_table("small", 7).macs(widths) == count_macs(model)
    study = {"models": ["small"], "targets": {"small": [0.5]}, "dataset": "digits", "device": "cpu"}
    assert {config.model for config in StudyParameters.parse(study).run_configs("digits")} == {"small"}
    with pytest.raises(ConfigError, match="small cannot train on crops of 12 pixels"):
        StudyParameters.parse(study | {"recipe_overrides": {"crop": 12}})


def test_a_file_that_states_other_widths_than_its_network_has_is_refused(small):
    (small / "small.py").write_text(SMALL.replace("(a, b) = widths", "a, b = widths[0], widths[1] + 1"))
    with pytest.raises(ConfigError, match=r"Small Net states the dense widths \(12, 20\).*'conv2': 21"):
        prunable_convs("small")


def test_two_files_cannot_name_the_same_network(small):
    (small / "small.py").write_text(SMALL.replace('"small"', '"vgg16"'))
    with pytest.raises(ConfigError, match="small.py|vgg.py"):
        all_networks()
