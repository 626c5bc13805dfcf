"""Branches, checked without their algebra: by impulses, finite differences, and logits before and after."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import apbm_core
from apbm_core.branches import (
    KINDS,
    BranchedConv2d,
    add_branches,
    fusion_of,
    merge_branches,
    normed_convolutions,
    why_not_branched,
)
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.study.networks.models import build_model

SHAPES = [
    # c_in, c_out, kernel, stride, padding, dilation, groups
    (6, 6, 3, 1, 1, 1, 1),
    (4, 7, 3, 1, 1, 1, 1),
    (7, 4, 3, 2, 1, 1, 1),
    (5, 5, 5, 2, 2, 1, 1),
    (5, 6, 1, 1, 0, 1, 1),
    (5, 6, 1, 3, 0, 1, 1),
    (5, 6, (3, 1), 1, (1, 0), 1, 1),
    (5, 6, 3, 1, 2, 2, 1),
    (5, 6, 3, 1, 0, 1, 1),
    (5, 6, 4, 1, 2, 1, 1),
    (6, 6, 3, 1, 1, 1, 6),
    (6, 6, 3, 2, 1, 1, 2),
    (6, 12, 3, 1, 1, 1, 3),
]


def layer(c_in, c_out, kernel, stride, padding, dilation, groups, kinds=KINDS, bias=True):
    torch.manual_seed(0)
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups, bias=bias)
    branched = BranchedConv2d(conv, nn.BatchNorm2d(c_out), kinds)
    disturb(branched)
    return branched


@torch.no_grad()
def disturb(model):
    """Norms as after a training: scales of both signs, one of them 0, and statistics of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.normal_()
            module.weight[0] = 0
            module.bias.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kinds", [KINDS, ("identity",), ("pointwise",)])
def test_the_merged_convolution_is_the_layer(shape, kinds):
    branched = layer(*shape, kinds=("pointwise", "identity") if shape[2] == 1 else kinds).double().eval()
    images = torch.randn(2, shape[0], 11, 9, dtype=torch.float64)
    kernel, bias = branched.merged()
    conv = branched.conv
    merged = F.conv2d(images, kernel, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    torch.testing.assert_close(merged, branched(images), rtol=1e-12, atol=1e-12)


def test_impulses_show_the_merged_kernel():
    """The response to a single pixel is the kernel, mirrored: found without any formula for the merge."""
    branched = layer(3, 5, 3, 1, 1, 1, 1).double().eval()
    kernel, bias = branched.merged()
    blank = branched(torch.zeros(1, 3, 5, 5, dtype=torch.float64))[0]
    torch.testing.assert_close(blank[:, 2, 2], bias)
    for channel in range(3):
        image = torch.zeros(1, 3, 5, 5, dtype=torch.float64)
        image[0, channel, 2, 2] = 1
        response = (branched(image)[0] - blank)[:, 1:4, 1:4]
        torch.testing.assert_close(response.flip(1, 2), kernel[:, channel])


def test_gradients_in_training_mode():
    branched = layer(3, 4, 3, 2, 1, 1, 1).double().train()
    for module in branched.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    images = torch.randn(3, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in branched.named_parameters()]

    def call(images, *values):
        return torch.func.functional_call(branched, dict(zip(names, values, strict=True)), images)

    values = [parameter.detach().requires_grad_() for parameter in branched.parameters()]
    assert torch.autograd.gradcheck(call, (images, *values), atol=1e-6)


@pytest.mark.parametrize("name", ["vgg16", "resnet20"])
def test_logits_stay_after_training_and_merging(name):
    torch.manual_seed(0)
    model = build_model(name, 10)
    branched, report = add_branches(model, torch.zeros(1, 3, 32, 32))
    assert not report.left
    assert len(report.branched) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    optimizer = torch.optim.SGD(branched.parameters(), lr=0.05)
    for _ in range(3):
        loss = F.cross_entropy(branched(torch.randn(16, 3, 32, 32)), torch.randint(10, (16,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = torch.randn(8, 3, 32, 32)
    expected = branched.eval()(images)
    for calibration in (None, torch.randn(32, 3, 32, 32)):
        merged = merge_branches(branched, calibration).eval()
        assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in model.named_modules()}
        assert merged.state_dict().keys() == model.state_dict().keys()
        assert (merged(images) - expected).norm() / expected.norm() < 1e-4


def test_measured_norms_hardly_change_in_training():
    torch.manual_seed(0)
    branched, _ = add_branches(build_model("resnet20", 10), torch.zeros(1, 3, 32, 32))
    disturb(branched)
    images = torch.randn(256, 3, 16, 16)
    merged = merge_branches(branched, images)
    still, moving = merged.eval()(images), merged.train()(images)
    assert (still - moving).norm() / still.norm() < 1e-2


def test_the_original_is_not_touched():
    model = build_model("resnet20", 10)
    before = copy.deepcopy(model.state_dict())
    add_branches(model, torch.zeros(1, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Odd(nn.Module):
    """Every reason for which a convolution is left alone."""

    def __init__(self):
        super().__init__()
        self.good = nn.Conv2d(3, 4, 3, padding=1)
        self.good_norm = nn.BatchNorm2d(4)
        self.bare = nn.Conv2d(4, 4, 3, padding=1)
        self.split = nn.Conv2d(4, 4, 3, padding=1)
        self.split_norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.shared_a = nn.Conv2d(4, 4, 3, padding=1)
        self.shared_b = nn.Conv2d(4, 4, 3, padding=1)
        self.shared_norm = nn.BatchNorm2d(4)
        self.reflecting = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.reflecting_norm = nn.BatchNorm2d(4)
        self.unused = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = F.relu(self.good_norm(self.good(x)))
        x = x.view(x.size(0), 4, *x.shape[2:])
        x = F.relu(self.bare(x))
        y = self.split(x)
        x = self.split_norm(y) + 0.1 * y
        x = self.norms[1](self.twice(self.norms[0](self.twice(x))))
        x = self.shared_norm(self.shared_b(self.shared_norm(self.shared_a(x))))
        return self.reflecting_norm(self.reflecting(x)).mean((2, 3))


def test_what_cannot_have_branches_is_left_with_a_reason():
    branched, report = add_branches(Odd(), torch.zeros(2, 3, 8, 8))
    assert report.branched == ("good",)
    left = {name: reason.split(",")[0] for name, reason in report.left.items()}
    assert left == {
        "bare": "no BatchNorm reads its output",
        "split": "more than the BatchNorm reads its output",
        "twice": "the forward pass calls it 2 times",
        "shared_a": "the forward pass calls its norm",
        "shared_b": "the forward pass calls its norm",
        "reflecting": "it pads with 'reflect'",
        "unused": "the forward pass calls it 0 times",
    }
    merged = merge_branches(branched.eval())
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(merged(images), branched(images))


def test_an_output_that_is_also_returned_is_left():
    class Returned(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[1](y), y

    model = Returned(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    found, left = normed_convolutions(model, torch.zeros(1, 3, 8, 8))
    assert not found and left == {"0": "more than the BatchNorm reads its output"}


def test_wrong_use_is_named():
    model = build_model("resnet20", 10)
    with pytest.raises(ConfigError, match="there is no branch 'skip'"):
        add_branches(model, torch.zeros(1, 3, 32, 32), kinds=("skip",))
    with pytest.raises(ConfigError, match="no convolution is called 'conv9'"):
        add_branches(model, torch.zeros(1, 3, 32, 32), layers=["conv9"])
    with pytest.raises(ConfigError, match="no branched layer"):
        merge_branches(model)
    with pytest.raises(UnsupportedNetwork, match="none of its"):
        BranchedConv2d(nn.Conv2d(3, 3, 3, padding=4), nn.BatchNorm2d(3))
    assert why_not_branched(nn.Conv2d(3, 3, 3, padding="same"), nn.BatchNorm2d(3))
    assert why_not_branched(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3, affine=False))


def answering(kinds=("fused",), passing=False, model=None):
    """A network whose unimportant filters answer in a branch, after a few steps with rescoring; and its optimizer."""
    torch.manual_seed(0)
    model = model or nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 10, (3, 1), stride=2, padding=(1, 0), bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 9, 5, padding=2),
        nn.BatchNorm2d(9),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(9, 4),
    )
    images = torch.randn(16, 3, 12, 12)
    slim = apbm_core.fuse(model, images, 0.5, groups=False, passing=passing)
    branched, report = add_branches(slim, images, kinds)
    optimizer = torch.optim.SGD(branched.parameters(), lr=0.05, momentum=0.9)
    return branched, report, optimizer, images


def steps(model, optimizer, images, progresses, collapse=False):
    for progress in progresses:
        apbm_core.rescore(model, progress)
        if collapse:
            apbm_core.collapse(model, optimizer)
        loss = F.cross_entropy(model(images), torch.arange(len(images)) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("passing", [False, True])
@pytest.mark.parametrize("kinds", [("fused",), ("fused", "identity"), ("fused", "pointwise", "identity")])
def test_fused_responses_merge_into_one_convolution(kinds, passing, collapse):
    model, report, optimizer, images = answering(kinds, passing)
    assert not report.left
    steps(model, optimizer, images, (0.0, 0.2, 0.4, 0.7, 0.9), collapse)
    disturb(model)
    expected = model.eval()(images)
    net = merge_branches(apbm_core.compact(model)).eval()
    assert (net(images) - expected).norm() / expected.norm() < 1e-5
    assert [tuple(p.shape) for p in net.parameters() if p.dim() == 4] == [(6, 3, 3, 3), (5, 6, 3, 1), (4, 5, 5, 5)]


def test_responses_are_what_the_formula_says_filter_by_filter():
    """y_k = BN_0(w_{s_k} x) + BN_1(sum_u Q_ku w_u x), each response by a convolution of its own."""
    model, _, optimizer, images = answering()
    steps(model, optimizer, images, (0.0, 0.3))
    layer = model[0].eval()
    fusion, bank = fusion_of(layer.conv), layer.conv.parametrizations.weight.original
    log_p, _ = fusion.log_similarity(bank, 0.3)
    apbm_core.rescore(model, 0.3)
    kept = fusion.selected.tolist()
    fused = [torch.zeros(16, 12, 12) for _ in kept]
    for u in set(range(12)) - set(kept):
        shares = [log_p[u, k].exp().item() for k in kept]
        answer = F.conv2d(images, bank[u : u + 1], padding=1)[:, 0]
        fused = [f + share / sum(shares) * answer for f, share in zip(fused, shares, strict=True)]
    own = F.conv2d(images, bank[kept], layer.conv.bias[:6], padding=1)
    fused = torch.stack(fused, 1) + layer.conv.bias[6:].view(1, -1, 1, 1)
    torch.testing.assert_close(layer(images), layer.norm(own) + layer.fused_norm(fused), rtol=1e-4, atol=1e-4)


def test_gradients_of_responses_reach_every_filter():
    model, _, _, images = answering()
    layer = model[0].double().eval()
    fusion = fusion_of(layer.conv)
    few = images[:2, :, :4, :4].double()
    bank = layer.conv.parametrizations.weight.original.detach().double().requires_grad_()

    def call(bank):
        names = {"conv.parametrizations.weight.original": bank}
        return torch.func.functional_call(layer, names, few)

    assert torch.autograd.gradcheck(call, (bank,), atol=1e-6)
    (gradient,) = torch.autograd.grad(call(bank).square().sum(), bank)
    assert (gradient.flatten(1).norm(dim=1) > 0).all() and len(gradient) == 2 * len(fusion.selected)


def test_who_answers_can_be_saved_and_loaded_before_and_after_a_collapse():
    for progresses in ((0.0, 0.3), (0.0, 0.3, 0.9)):
        model, _, optimizer, images = answering(("fused", "identity"))
        steps(model, optimizer, images, progresses, collapse=True)
        again, *_ = answering(("fused", "identity"))
        again.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(images), again.eval()(images))


def test_only_fused_convolutions_have_a_branch_of_responses():
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"no convolution is fused.*apbm_core.fuse"):
        add_branches(build_model("vgg16", 10), images, ("fused",))
    with pytest.raises(ConfigError, match="there is no branch 'mixed'; allowed: pointwise, identity, fused"):
        add_branches(build_model("vgg16", 10), images, ("mixed",))
    slim = apbm_core.fuse(build_model("resnet20", 10), images, {"layer1.0.conv1": 0.5}, groups=False)
    branched, report = add_branches(slim, images, ("fused",))
    assert report.branched == ("layer1.0.conv1",) and set(report.left.values()) == {"it is not fused"}
    assert fusion_of(branched.get_submodule("layer1.0.conv1.conv")).responses is not None
    assert fusion_of(slim.get_submodule("layer1.0.conv1")).responses is None, "the original is as it was"
