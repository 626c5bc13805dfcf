"""Layers that hang together are cut and fused as one; what cannot be shown to be right is left alone, and named."""

import pytest
import torch
import torchvision
from test_surgery import randomised, silenced
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import apbm_core
from apbm_core.anatomy import Anatomy
from apbm_core.forward import call
from apbm_core.fusion import fused_layers
from apbm_core.similarity import log_similarity, pairwise_distances, relative_entropy, scale_free

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def removed(model: nn.Module, net: nn.Module) -> float:
    return 1 - sum(p.numel() for p in net.parameters()) / sum(p.numel() for p in model.parameters())


def fused_and_compact_agree(model: nn.Module, inputs=IMAGES, keep=0.5) -> nn.Module:
    fused = apbm_core.fuse(model, inputs, keep)
    apbm_core.rescore(fused, progress=0.3)
    net = apbm_core.compact(fused.eval())
    with torch.no_grad():
        found, wanted = call(net, inputs), call(fused, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not any(True for _ in fused_layers(net))
    return net


class Residual(nn.Module):
    """A sum of two layers, one of them gated by a third."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.gate, self.norm, self.head = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.norm(x + self.second(x.relu()) * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()))


def test_tied_layers_are_one_group_and_its_surgery_silences_the_channels_in_all_of_them():
    torch.manual_seed(0)
    model = randomised(Residual())
    assert set(Anatomy(model, IMAGES, True).groups["first"].layers) == {"first", "second", "gate"}
    kept = [0, 3, 4, 7, 11]
    small = apbm_core.slim(model, IMAGES, {"second": kept}, groups=True)
    with torch.no_grad():
        wanted = silenced(model, dict.fromkeys(("first", "second", "gate"), kept), IMAGES)
        torch.testing.assert_close(small(IMAGES), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(apbm_core.ApbmError, match="coupled"):
        apbm_core.slim(model, IMAGES, {"second": kept})


def test_a_group_has_one_selection_and_one_mixture_from_the_filters_of_all_its_layers():
    torch.manual_seed(0)
    model = Residual()
    settings = apbm_core.FusionSettings(rescale=False)
    fused = apbm_core.fuse(model, IMAGES, 0.5, settings)
    layers = {name: (module.parametrizations.weight.original.detach(), f) for name, module, f in fused_layers(fused)}
    rows = []
    for name in ("first", "second", "gate"):
        bank = layers[name][0].flatten(1).double()
        distance = pairwise_distances(bank)
        rows.append(bank / (distance.sum() / (12 * 11)))
    log_p = log_similarity(scale_free(pairwise_distances(torch.cat(rows, 1))), torch.log(torch.tensor(12.0)).item())
    selected = layers["first"][1].selected.clone()
    first_matrices = {name: fusion.matrix.clone() for name, (_, fusion) in layers.items()}
    for _, fusion in layers.values():
        assert torch.equal(fusion.selected, selected)
        torch.testing.assert_close(fusion.matrix.double(), log_p[selected].exp(), rtol=1e-5, atol=1e-7)
    apbm_core.rescore(fused, 0.2)
    log_p = log_similarity(
        scale_free(pairwise_distances(torch.cat(rows, 1))), (1 + 0.2 / 0.6) * torch.log(torch.tensor(12.0)).item()
    )
    expected = set(relative_entropy(log_p).topk(6).indices.tolist())
    assert all(set(fusion.selected.tolist()) == expected for _, fusion in layers.values())
    assert len({tuple(fusion.selected.tolist()) for _, fusion in layers.values()}) == 1  # in the same slots
    rescaled = apbm_core.fuse(model, IMAGES, 0.5)
    for name, module, fusion in fused_layers(rescaled):  # the same P, to each layer's own length
        assert not fusion.is_selection
        torch.testing.assert_close(fusion.matrix / fusion.matrix.sum(1, keepdim=True), first_matrices[name])
        kept = module.parametrizations.weight.original[fusion.selected]
        torch.testing.assert_close(module.weight.flatten(1).norm(dim=1).mean(), kept.flatten(1).norm(dim=1).mean())


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_convolution_mixes_within_its_groups_only(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=groups), nn.ReLU(), nn.Conv2d(16, 2, 3))
    fused = apbm_core.fuse(model, IMAGES)
    size = 16 // groups
    for _, _, fusion in fused_layers(fused):
        blocks = fusion.matrix.view(groups, size // 2, groups, size)
        for row in range(groups):
            for column in range(groups):
                same = torch.equal(blocks[row, :, column], blocks[0, :, 0])
                assert same if row == column else blocks[row, :, column].abs().max() == 0
    fused_and_compact_agree(model)


def small_net(*layers: nn.Module, pool: type = nn.AdaptiveAvgPool2d) -> nn.Module:
    return nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(12, 5))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.head = nn.Linear(8, 2)

    def forward(self, left, right):
        return self.head(torch.cat([self.encoder(left).mean((2, 3)), self.encoder(right).mean((2, 3))], 1))


KINDS = {
    "1-d": (
        small_net(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 12, 3), pool=nn.AdaptiveAvgPool1d),
        IMAGES.flatten(2),
        0.55,
    ),
    "3-d": (
        small_net(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 12, 3), pool=nn.AdaptiveAvgPool3d),
        IMAGES[:, :, None].expand(-1, -1, 8, -1, -1),
        0.6,
    ),
    "perceptron": (
        nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)),
        IMAGES[:, 0, 0],
        0.6,
    ),
    "autoencoder": (
        nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 2, 2), nn.ReLU(), nn.ConvTranspose2d(16, 3, 2, 2),
        ),
        IMAGES,
        0.65,
    ),
    "GroupNorm": (small_net(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 12, 3)), IMAGES, 0.6),
    "called twice": (Siamese(), (IMAGES, IMAGES.flip(3)), 0.4),
    "called by name": (Siamese(), {"left": IMAGES, "right": IMAGES.flip(3)}, 0.4),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_networks_of_every_kind_of_layer(name):
    torch.manual_seed(0)
    model, inputs, least = KINDS[name]
    net = fused_and_compact_agree(model, inputs)
    assert removed(model, net) > least


class Reads(nn.Module):
    """Three layers, of which the middle one's channels are read in an unusual way."""

    def __init__(self, how, wide: int, narrow: int):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, wide, 3), nn.Conv2d(narrow, 3, 3)
        self.how = how

    def forward(self, x):
        return self.last(self.how(self.middle(self.first(x).relu())))


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


UNUSUAL = {
    "every second channel": Reads(lambda x: x[:, ::2], 16, 8),
    "gated linear unit": Reads(lambda x: F.glu(x, 1), 16, 8),
    "pixel shuffle": Reads(lambda x: F.pixel_shuffle(x, 2), 16, 4),
    "channel shuffle": Reads(shuffled, 16, 16),
    "reversed": Reads(lambda x: x.flip(1), 16, 16),
    "mean over channels": Reads(lambda x: x - x.mean(1, keepdim=True), 16, 16),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", UNUSUAL)
def test_channels_read_in_unusual_ways_are_followed_rightly_or_left_alone(name, seed):
    torch.manual_seed(seed)
    model = UNUSUAL[name]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    reasons = apbm_core.why_not_prunable(model, IMAGES, groups=True)
    assert reasons["first"] is None
    keep = {"first": [0, 2, 3, 7]}
    if reasons["middle"] is None:  # two of the units that it has
        units = Anatomy(model, IMAGES, True).group_of("middle").layers["middle"]
        keep["middle"] = sorted(units[1:3].flatten().tolist())
    small = apbm_core.slim(model, IMAGES, keep, groups=True)

    def without(_module, _inputs, output, kept):
        mask = torch.zeros(output.shape[1])
        mask[kept] = 1
        return output * mask.view(-1, 1, 1)

    handles = [
        model.get_submodule(layer).register_forward_hook(lambda m, i, o, kept=kept: without(m, i, o, kept))
        for layer, kept in keep.items()
    ]
    try:
        with torch.no_grad():
            torch.testing.assert_close(small(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    finally:
        for handle in handles:
            handle.remove()
    fused_and_compact_agree(model)


class MaxNorm(nn.Conv2d):
    """Keeps its filters short by changing them whenever it is called."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


class Masked(nn.Conv2d):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("mask", (torch.rand_like(self.weight) < 0.5).float())

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def chain(middle: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), middle, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
    )


WEIGHTS = {
    "weight norm": lambda: chain(parametrizations.weight_norm(nn.Conv2d(8, 8, 3))),
    "old weight norm": lambda: chain(torch.nn.utils.weight_norm(nn.Conv2d(8, 8, 3))),
    "spectral norm": lambda: chain(parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))),
    "pruning mask": lambda: chain(prune.random_unstructured(nn.Conv2d(8, 8, 3), "weight", 0.5)),
    "max norm": lambda: chain(MaxNorm(8, 8, 3)),
    "mask of its own": lambda: chain(Masked(8, 8, 3)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_layer_that_computes_its_weight_is_left_alone_and_the_others_are_not(name):
    torch.manual_seed(0)
    model = WEIGHTS[name]()
    model(IMAGES)  # old norms and masks keep what they computed
    reasons = apbm_core.why_not_prunable(model, IMAGES, groups=True)
    assert reasons["1"] is not None and reasons["2"] is None and reasons["4"] is None
    net = fused_and_compact_agree(model.eval())
    assert type(net[1]) is type(model[1]) and net[2].out_channels == 4
    fused = apbm_core.fuse(model, IMAGES)
    fused(IMAGES).sum().backward()
    if name != "max norm":
        assert set(dict(fused[1].named_parameters())) == set(dict(model[1].named_parameters()))


def test_layers_that_share_a_parameter_are_left_alone():
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 8, 8, 3) for i in range(5)), nn.Conv2d(8, 2, 1))
    model[1].bias = model[0].bias
    reasons = apbm_core.why_not_prunable(model, IMAGES, groups=True)
    assert "shares its bias" in reasons["0"] and "shares its bias" in reasons["1"] and reasons["3"] is None
    net = fused_and_compact_agree(model)
    assert net[1].bias is net[0].bias


def test_one_model_of_each_family_of_torchvision_loses_most_of_it():
    model = torchvision.models.resnet18(num_classes=10).eval()
    assert removed(model, fused_and_compact_agree(model, IMAGES)) > 0.74


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [("resnet50", 0.7), ("regnet_x_400mf", 0.7), ("regnet_y_400mf", 0.7), ("resnext50_32x4d", 0.7), ("vgg11_bn", 0.7),
     ("efficientnet_b0", 0.7), ("mobilenet_v3_small", 0.7), ("convnext_tiny", 0.7), ("densenet121", 0.7)],
)  # fmt: skip
def test_torchvisions_networks(name, least):
    model = getattr(torchvision.models, name)(num_classes=10).eval()
    x = torch.randn(1, 3, 64, 64)
    assert removed(model, fused_and_compact_agree(model, x)) >= least


def test_widths_can_be_held_to_a_minimum_and_a_multiple():
    model = nn.Sequential(nn.Conv2d(3, 30, 3), nn.Conv2d(30, 12, 3), nn.Conv2d(12, 6, 3), nn.Conv2d(6, 2, 1))
    fused = apbm_core.fuse(model, IMAGES, 0.4, min_filters=4, multiple=8)
    assert [fused[i].weight.shape[0] for i in range(3)] == [16, 8, 6]


def test_inputs_made_without_gradients_will_do():
    model = Residual()
    with torch.inference_mode():
        inputs = torch.randn(2, 3, 16, 16)
        fused = apbm_core.fuse(model, inputs)
        net = apbm_core.compact(fused)
    for trained in (fused, net):
        trained(IMAGES).sum().backward()
        torch.optim.SGD(trained.parameters(), 0.1).step()
