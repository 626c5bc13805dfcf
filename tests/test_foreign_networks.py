"""Somebody else's network: each works, layer by layer, or is declined with a reason."""

import importlib
import importlib.util
import re
from functools import cache, partial
from pathlib import Path
from typing import get_args

import pytest
import torch
import torchvision
from test_surgery import randomised, silenced
from torch import nn
from torch.nn import functional as F
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.vision_transformer import VisionTransformer

import apbm_core
from apbm_core import export
from apbm_core.counting import count_parameters
from apbm_core.errors import ApbmError, UnsupportedNetwork
from apbm_core.fusion import fused_layers
from apbm_core.study.methods import all_methods, entropy_cut, fpgm, fused_by_responses, global_l1, hrank, l1, random
from apbm_core.study.methods.variants import VariantSettings
from apbm_core.study.networks.layers import keep_largest
from apbm_core.surgery import why_not_prunable

fuse_alone = partial(apbm_core.fuse, groups=False)

# Name -> how many of its convolutions have filters that can go: counted by hand from the architecture.
NETWORKS = {
    "small": 7,  # 4 expansions, the stem, the last one, and the projection that is added to nothing
    "resnet18": 8,  # the first of the two in each block
    "mobilenet_v2": 20,  # 16 expansions, the stem, the last one, and the two projections that are added to nothing
    "efficientnet_b0": 19,  # 16 squeezes, the last one, and the two projections that are added to nothing
    "regnet_y_400mf": 17,  # 16 squeezes and the stem; all others are grouped, gated or added
    "resnet50": 33,  # the first two of three in each of 16 blocks, and the stem
    "densenet121": 120,  # all: concatenation couples nothing
    "vgg16_bn": 13,  # all
}
MARKED = [pytest.param(name, marks=() if name == "small" else pytest.mark.slow) for name in NETWORKS]
IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@cache
def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "small":  # (expansion, channels, blocks, stride)
        stages = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
        return randomised(torchvision.models.MobileNetV2(5, 0.5, stages))
    return randomised(getattr(torchvision.models, name)(num_classes=5))


@cache
def reasons(name: str) -> dict[str, str | None]:
    return why_not_prunable(network(name), IMAGES[:1])


def prunable(name: str) -> list[str]:
    return [layer for layer, reason in reasons(name).items() if reason is None]


def assert_same_logits(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ((a - b).abs().max() / a.abs().max()).item() < tolerance


@pytest.mark.parametrize("name", MARKED)
def test_every_convolution_is_prunable_or_has_a_reason(name):
    assert len(prunable(name)) == NETWORKS[name]
    convolutions = [layer for layer, module in network(name).named_modules() if isinstance(module, nn.Conv2d)]
    assert list(reasons(name)) == convolutions
    assert all(len(reason) > 20 for reason in reasons(name).values() if reason is not None)


@pytest.mark.parametrize("name", MARKED)
def test_fused_it_takes_a_training_step_and_its_compact_network_has_the_same_logits(name):
    slim = fuse_alone(network(name), IMAGES[:1], keep=0.5)
    banks = {layer: conv.parametrizations.weight.original for layer, conv, _ in fused_layers(slim)}
    before = {layer: bank.detach().clone() for layer, bank in banks.items()}
    optimizer = torch.optim.SGD(slim.train().parameters(), lr=0.01)
    F.cross_entropy(slim(IMAGES), torch.arange(4)).backward()
    optimizer.step()
    assert list(banks) == prunable(name)
    assert not any(torch.equal(bank, before[layer]) for layer, bank in banks.items())
    apbm_core.rescore(slim, progress=0.4)
    slim.eval()
    net = apbm_core.compact(slim)
    with torch.no_grad():
        assert_same_logits(slim(IMAGES), net(IMAGES))
    dense, small = (sum(p.numel() for p in model.parameters()) for model in (network(name), net))
    assert small < dense


# The fusion's own scores, and the functions of the methods that rank filters
CRITERIA = {
    "relative entropy": VariantSettings(fuse=False),
    "relative entropy of cosine distances": VariantSettings(fuse=False, metric="cosine"),
    "entropy": VariantSettings(fuse=False, score="entropy"),
    "order": VariantSettings(fuse=False, score="order"),
    "L1": l1,
    "global_l1": global_l1,
    "FPGM": fpgm,
    "entropy_cut": entropy_cut,
    "fused_by_responses": fused_by_responses,
    "HRank": hrank,
    "random": random,
}


def test_no_ranking_method_and_no_score_of_the_fusion_is_left_out():
    modules = {name: importlib.import_module(f"apbm_core.study.methods.{name}") for name in all_methods()}
    scores = {name: module.scores for name, module in modules.items() if hasattr(module, "scores")}
    ranking = {name for name, function in scores.items() if function.__module__ == modules[name].__name__}
    assert ranking == {name.lower() for name in CRITERIA} & set(all_methods())
    tested = {(c.metric, c.score) for c in CRITERIA.values() if isinstance(c, VariantSettings)}
    scores = set(get_args(VariantSettings.model_fields["score"].annotation)) - {"l1"}  # the method L1's
    assert tested == {("euclidean", score) for score in scores} | {("cosine", "relative-entropy")}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", MARKED)
def test_every_criterion_cuts_it(name, criterion):
    """The cut network is the dense one with the channels of the filters that went silenced, found without tracing."""
    model, layers, criterion = network(name), prunable(name), CRITERIA[criterion]
    if isinstance(criterion, VariantSettings):
        fused = fuse_alone(model, IMAGES[:1], keep=0.5, settings=criterion)
        keep = {layer: fusion.selected.tolist() for layer, _, fusion in fused_layers(fused)}
        small = apbm_core.compact(fused)
    else:
        found = criterion.scores(model, layers, IMAGES, seed=0)
        keep = {layer: keep_largest(scores, (len(scores) + 1) // 2).tolist() for layer, scores in found.items()}
        small = apbm_core.slim(model, IMAGES[:1], keep)
    with torch.no_grad():
        assert_same_logits(silenced(model, keep, IMAGES), small(IMAGES), 1e-4)


@pytest.mark.parametrize("name", MARKED)
def test_compact_it_round_trips_through_onnx(name, tmp_path):
    if reason := export.why_no_onnx():
        pytest.skip(reason)
    net = apbm_core.compact(fuse_alone(network(name), IMAGES[:1], keep=0.5))
    call = export.open_file(export.write_onnx(tmp_path / "net.onnx", net, IMAGES[:1]))
    for count in (1, 4):
        with torch.no_grad():
            assert_same_logits(net(IMAGES[:count]), call(IMAGES[:count]), 1e-4)


class ConvLSTM(nn.Module):
    """A recurrent network that reads the pixels of a convolution's maps in turn."""

    def __init__(self):
        super().__init__()
        self.conv, self.lstm, self.head = nn.Conv2d(3, 24, 4, 4), nn.LSTM(24, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.lstm(self.conv(x).flatten(2).transpose(1, 2))[0][:, -1])


class Encoder(nn.Module):
    """A transformer encoder over the patches that a convolution cuts out."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 8, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 32, batch_first=True), 1)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.encoder(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def small_convnext() -> nn.Module:
    return torchvision.models.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=5)


DECLINED = {
    "convnext": (small_convnext, "combined with the parameter .*layer_s"),
    "vision transformer": (
        lambda: VisionTransformer(64, 16, 1, 2, 32, 64, num_classes=5),
        "encoder.pos_embedding|class_token|parameter",
    ),
    "LSTM": (ConvLSTM, "go through lstm, a LSTM"),
    "transformer encoder": (Encoder, "MultiheadAttention"),
    "no convolution": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5)), "no layer that others read"),
    "TorchScript": (lambda: torch.jit.script(small_net()), "TorchScript"),
    "compiled": (lambda: torch.compile(small_net()), "is compiled"),
    "weight normalisation": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
        "no layer reads its outputs",
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_cannot_be_fused_is_declined_with_a_reason(name):
    build, words = DECLINED[name]
    with pytest.raises(UnsupportedNetwork, match=words):
        fuse_alone(build(), IMAGES[:2])


def test_each_convolution_of_convnext_is_declined_with_a_reason_and_so_is_naming_one_to_cut():
    model = small_convnext().eval()
    reasons = why_not_prunable(model, IMAGES[:1])
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(reasons) == convolutions and all(reason and len(reason) > 20 for reason in reasons.values())
    with pytest.raises(ApbmError, match="features.0.0"):
        apbm_core.slim(model, IMAGES[:1], {"features.0.0": [0, 1, 2]})


@pytest.mark.slow
def test_with_auxiliary_heads_what_they_read_stays_and_the_rest_is_fused():
    model = torchvision.models.googlenet(num_classes=5, init_weights=False)
    slim = fuse_alone(model, IMAGES[:2]).train()
    assert len(list(fused_layers(slim))) > 10
    assert [tuple(output.shape) for output in slim(IMAGES[:2])] == [(2, 5)] * 3


@pytest.mark.slow
def test_auxiliary_heads_can_be_left_out():
    model = torchvision.models.googlenet(num_classes=5, init_weights=False, aux_logits=False)
    slim = fuse_alone(model, IMAGES[:2])
    assert slim.train()(IMAGES).shape == (4, 5)


class Auxiliary(nn.Module):
    """A second head, in training alone, on features that the first one reads through another layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.head, self.beside = nn.Linear(6, 4), nn.Linear(8, 4)

    def forward(self, x):
        early = self.first(x).relu()
        logits = self.head(self.second(early).relu().mean((2, 3)))
        return (logits, self.beside(early.mean((2, 3)))) if self.training else logits


def test_what_a_head_reads_in_training_alone_stays_and_the_rest_is_fused():
    reasons = why_not_prunable(Auxiliary(), IMAGES)
    assert "training mode" in reasons["first"] and reasons["second"] is None
    slim = fuse_alone(Auxiliary(), IMAGES).train()
    assert [name for name, _, _ in fused_layers(slim)] == ["second"]
    assert [tuple(output.shape) for output in slim(IMAGES)] == [(4, 4)] * 2


class Outputs(nn.Module):
    """Two convolutions and a head; what ``returned`` makes of the features goes out beside the logits."""

    def __init__(self, returned=None):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        self.returned = returned

    def forward(self, x):
        features = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        found = {"logits": self.head(features)}
        return found if self.returned is None else found | {"more": [{"features": self.returned(features)}]}


def test_dictionaries_come_out_as_they_did():
    model = Outputs().eval()
    slim = fuse_alone(model, IMAGES)
    net = apbm_core.compact(slim)
    assert [net.first.out_channels, net.second.out_channels] == [4, 3]
    with torch.no_grad():
        assert_same_logits(slim(IMAGES)["logits"], net(IMAGES)["logits"])


@pytest.mark.parametrize("returned", [lambda f: f.sum(1), lambda f: f.sum(), lambda f: f * 2], ids=["row", "sum", "x2"])
def test_a_layer_whose_features_are_returned_keeps_its_filters(returned):
    model = Outputs(returned).eval()
    assert "returns its outputs" in why_not_prunable(model, IMAGES)["second"]
    net = apbm_core.compact(fuse_alone(model, IMAGES))
    assert [net.first.out_channels, net.second.out_channels] == [4, 6]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-6)])
def test_other_precisions_are_kept(dtype, tolerance):
    model, images = small_net().to(dtype), IMAGES.to(dtype)
    slim = fuse_alone(model, images)
    slim(images).square().mean().backward()
    apbm_core.rescore(slim, 0.5)
    net = apbm_core.compact(slim.eval())
    assert {p.dtype for p in net.parameters()} == {dtype}
    with torch.no_grad():
        assert_same_logits(slim(images), net(images), tolerance)
    for criterion in (l1, fpgm, hrank, random):
        assert criterion.scores(model, ["0"], images, 0)["0"].dtype == torch.float64


def test_hooks_stay_and_nothing_else_of_the_model_changes():
    model = small_net().train()
    model[2].eval()  # a mode of its own
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    slim = fuse_alone(model, IMAGES)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False, True, True, True]
    assert [module.training for module in slim] == [True, True, False, True, True, True]
    net = apbm_core.compact(slim)
    with torch.no_grad():
        torch.testing.assert_close(net[0](IMAGES), 2 * F.conv2d(IMAGES, net[0].weight, net[0].bias))


def test_data_parallel_is_seen_through():
    slim = fuse_alone(nn.DataParallel(small_net()), IMAGES)
    slim(IMAGES).square().mean().backward()
    apbm_core.rescore(slim, 0.5)
    slim.eval()
    with torch.no_grad():
        assert_same_logits(slim(IMAGES), apbm_core.compact(slim)(IMAGES))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_fused_network_trains_under_ddp_as_it_does_alone(one_process):
    start = fuse_alone(small_net(), IMAGES)
    state = {key: value.clone() if isinstance(value, torch.Tensor) else value
             for key, value in start.state_dict().items()}  # fmt: skip
    results = []
    for wrap in (lambda model: model, nn.parallel.DistributedDataParallel):
        start.load_state_dict(state)
        model = wrap(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for epoch in range(3):
            apbm_core.rescore(model, epoch / 3)
            optimizer.zero_grad()
            F.cross_entropy(model(IMAGES), torch.arange(4)).backward()
            optimizer.step()
        results.append({key: value.clone() for key, value in model.state_dict().items() if hasattr(value, "clone")})
    alone, wrapped = results
    assert {f"module.{key}" for key in alone} == set(wrapped)
    for key, value in alone.items():
        torch.testing.assert_close(wrapped[f"module.{key}"], value)
    assert not torch.equal(alone["0.parametrizations.weight.original"], state["0.parametrizations.weight.original"])
    again = fuse_alone(small_net(), IMAGES)
    again.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        assert_same_logits(model.eval()(IMAGES), apbm_core.compact(again.eval())(IMAGES))
    for verb in (apbm_core.compact, lambda net: fuse_alone(net, IMAGES)):
        with pytest.raises(UnsupportedNetwork, match=r"pass its \.module, and wrap what comes back"):
            verb(model)


@pytest.mark.slow
def test_a_fused_network_can_be_compiled():
    slim = fuse_alone(small_net(), IMAGES).eval()
    compiled = torch.compile(slim)
    with torch.no_grad():
        for progress in (0.0, 0.5, 1.0):
            apbm_core.rescore(slim, progress)
            assert_same_logits(slim(IMAGES), compiled(IMAGES), 1e-4)
    assert_same_logits(slim(IMAGES).detach(), apbm_core.compact(slim)(IMAGES).detach())


def example(name="own_training_loop"):
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHORT = ["--epochs", "1", "--steps", "2", "--size", "32", "--batch-size", "8"]


def test_the_example_compresses_resnet18_on_the_digits(capsys):
    net = example().main(["--demo", *SHORT, "--keep", "0.25"])
    assert net.layer1[0].conv1.out_channels == 16 and net.fc.out_features == 10
    assert {type(module) for module in net.modules() if isinstance(module, nn.Conv2d)} == {nn.Conv2d}
    said = capsys.readouterr().out
    accuracies = [line.rsplit("accuracy ", 1)[1].split("%")[0] for line in said.splitlines()]
    assert len(accuracies) == 2 and accuracies[0] == accuracies[1]  # compacting changes nothing


@pytest.mark.slow
def test_the_example_fuses_a_trained_network_and_loses_little(capsys):
    net = example("trained_network").main([])
    assert 0.24 < count_parameters(net) / count_parameters(torchvision.models.resnet18(num_classes=10)) <= 0.25
    trained, after, tuned = (float(part) for part in re.findall(r"([\d.]+)%", capsys.readouterr().out))
    assert trained > 85 and after > trained - 10 and tuned > trained - 3


@pytest.mark.parametrize("arguments", [["--target", "1"], ["--epochs", "0"]])
def test_the_example_of_a_trained_network_refuses_what_cannot_be(arguments, capsys):
    with pytest.raises(SystemExit):
        example("trained_network").main(arguments)
    assert "target lies between 0 and 1" in capsys.readouterr().err


def test_the_example_reads_a_folder_of_images(tmp_path):
    for number in range(24):
        folder = tmp_path / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        torchvision.io.write_png(torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8), str(folder / f"{number}.png"))
    assert example().main([str(tmp_path), *SHORT]).fc.out_features == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either a folder that exists or --demo"),
        (["--demo", "somewhere"], "either a folder that exists or --demo"),
        (["nowhere"], "either a folder that exists or --demo"),
        (["--demo", "--keep", "1.5"], "keep is above 0"),
        (["--demo", "--epochs", "0"], "epochs and steps from 1"),
        (["--demo", "--steps", "0"], "epochs and steps from 1"),
        (["--demo", "--batch-size", "5000"], "do not fill one batch of 5000"),
        (["--demo", "--lr", "1"], "unrecognized arguments"),
    ],
)
def test_the_example_refuses_impossible_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        example().main(arguments)
    assert words in capsys.readouterr().err
