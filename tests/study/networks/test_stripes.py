"""Stripe convolutions against masked dense ones, their counts by hand, storage, and export."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from apbm_core.counting import count_macs, count_parameters
from apbm_core.errors import ConfigError, UnsupportedNetwork
from apbm_core.study.networks.models import build_model
from apbm_core.study.networks.stripes import (
    FilterSkeleton,
    StripeConv2d,
    add_skeletons,
    apply_stripe_description,
    pack_mask,
    skeleton_layers,
    stripe_description,
    to_stripes,
    unpack_mask,
    without_skeletons,
)


def masked(conv: nn.Conv2d, mask: torch.Tensor) -> nn.Conv2d:
    dense = copy.deepcopy(conv)
    with torch.no_grad():
        dense.weight *= mask[:, None]
    return dense


@settings(max_examples=60)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just("valid")),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    share=st.sampled_from([0.0, 0.1, 0.4, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_masked_dense_convolution_with_gradients(kernel, stride, padding, dilation, bias, share, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 5, kernel, stride, padding, dilation, bias=bias)
    mask = torch.rand(5, *kernel) < share
    dense, stripes = masked(conv, mask), StripeConv2d(conv, mask)
    assert torch.equal(stripes.mask, mask)
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    expected, found = dense(x), stripes(twin)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if not found.requires_grad:  # nothing is left that could learn
        assert not mask.any() and not bias
        return
    backwards = torch.randn_like(expected)
    expected.backward(backwards)
    found.backward(backwards)
    if mask.any():
        torch.testing.assert_close(twin.grad, x.grad, atol=1e-5, rtol=1e-4)
        # the gradient of stripe s is the dense gradient at its filter and position
        by_position = dense.weight.grad.flatten(2).permute(2, 0, 1)[mask.flatten(1).t()]
        torch.testing.assert_close(stripes.weight.grad, by_position, atol=1e-4, rtol=1e-4)
    if bias:
        torch.testing.assert_close(stripes.bias.grad, dense.bias.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", [3, 2, (4, 1)])
def test_same_padding_agrees(kernel):
    conv = nn.Conv2d(2, 3, kernel, padding="same")
    mask = torch.rand(3, *conv.kernel_size) < 0.6
    x = torch.randn(1, 2, 6, 7)
    torch.testing.assert_close(StripeConv2d(conv, mask)(x), masked(conv, mask)(x), atol=1e-5, rtol=1e-5)


def test_bfloat16_autocast_and_channels_last_agree_with_the_dense_layer():
    torch.manual_seed(0)
    for stride in (1, 2):
        conv = nn.Conv2d(8, 6, 3, stride, 1)
        mask = torch.rand(6, 3, 3) < 0.4
        x = torch.randn(2, 8, 8, 8).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = StripeConv2d(conv, mask)(x), masked(conv, mask)(x)
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("stride", "padding", "outputs"), [(1, 1, 81), (2, 1, 25), (1, 0, 49), (2, 0, 16), (1, 2, 121)]
)
def test_counts_by_hand(stride, padding, outputs):
    """5 stripes of 4 weights: 20 parameters and a bias of 3; each stripe costs 4 MACs for each output pixel."""
    mask = torch.zeros(3, 3, 3, dtype=torch.bool)
    mask.view(-1)[[0, 4, 8, 13, 20]] = True
    layer = StripeConv2d(nn.Conv2d(4, 3, 3, stride, padding), mask)
    assert count_parameters(layer) == 23
    assert count_macs(layer, (4, 9, 9)) == 5 * 4 * outputs


class Scatters(TorchDispatchMode):
    """Collects the index tensors of all scattered sums."""

    def __init__(self):
        super().__init__()
        self.indices = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "index_add" in func.name() or "scatter" in func.name() or "index_put" in func.name():
            self.indices.append(args[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [1, 2])
def test_no_scattered_sum_has_a_target_twice(stride):
    """ONNX Runtime's threads race on repeated targets, and now and then a forward pass is wrong."""
    layer = StripeConv2d(nn.Conv2d(2, 4, 3, stride, 1), torch.ones(4, 3, 3))
    with Scatters() as scatters:
        layer(torch.randn(1, 2, 8, 8))
    assert len(scatters.indices) == 9
    assert all(len(index.unique()) == len(index) for index in scatters.indices)


def test_layer_without_stripes_outputs_its_bias():
    conv = nn.Conv2d(2, 3, 3, padding=1)
    out = StripeConv2d(conv, torch.zeros(3, 3, 3, dtype=torch.bool))(torch.randn(1, 2, 4, 4))
    torch.testing.assert_close(out, conv.bias[None, :, None, None].expand(1, 3, 4, 4))


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")])
def test_refuses_what_has_no_stripe_form(conv):
    with pytest.raises(UnsupportedNetwork, match="groups"):
        StripeConv2d(conv, torch.ones(4, 3, 3))


def test_refuses_a_mask_of_another_shape():
    with pytest.raises(ConfigError, match=r"\(4, 3, 3\)"):
        StripeConv2d(nn.Conv2d(4, 4, 3), torch.ones(4, 3, 2))


def test_skeleton_starts_neutral_and_its_gradient_is_the_chain_rule():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1))
    x = torch.randn(1, 2, 5, 5)
    before = model(x)
    weight = model[0].weight.detach().clone()
    add_skeletons(model)
    assert [name for name, _, _ in skeleton_layers(model)] == ["0"]  # 1x1 convolutions have no stripes to choose
    torch.testing.assert_close(model(x), before)
    _, _, layer = next(skeleton_layers(model))
    mask = torch.rand(3, 3, 3) < 0.5
    layer.set_mask(mask)
    model[0](x).square().sum().backward()
    plain = nn.Conv2d(2, 3, 3)
    plain.load_state_dict({"weight": weight * mask[:, None], "bias": model[0].bias})
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer.skeleton.grad, (plain.weight.grad * weight).sum(1) * mask)


def test_skeleton_and_mask_travel_in_the_state_dict():
    layer = FilterSkeleton(2, (3, 3))
    layer.set_mask(torch.rand(2, 3, 3) < 0.5)
    twin = FilterSkeleton(2, (3, 3))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.mask, layer.mask) and torch.equal(twin.skeleton, layer.skeleton)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 3, 3), (4, 2, 2)])
def test_packed_masks_unpack(shape):
    mask = torch.rand(shape) < 0.5
    assert torch.equal(unpack_mask(pack_mask(mask), shape), mask)
    assert pack_mask(torch.tensor([True, False, False, False, True])) == "88"


@pytest.mark.parametrize("digits", ["zz", "123", ""])
def test_damaged_masks_are_refused(digits):
    with pytest.raises(ConfigError, match="hexadecimal"):
        unpack_mask(digits, (2, 2, 2))


def striped_resnet() -> tuple[nn.Module, nn.Module]:
    """A masked ResNet20 with dead filters inside blocks and in a residual sum, and its striped form."""
    torch.manual_seed(0)
    model = add_skeletons(build_model("resnet20")).eval()
    for name, _, layer in skeleton_layers(model):
        mask = torch.rand(layer.mask.shape) < 0.4
        mask[[1, 5]] = False  # dead filters
        if name == "layer2.1.conv2":
            mask[:] = False  # a coupled layer without any stripe: its block is the identity plus a constant
        layer.set_mask(mask)
    for block in (m for m in model.modules() if hasattr(m, "conv2")):
        nn.init.normal_(block.norm2.bias)  # a constant that dead filters of a residual sum must keep
    masks = {name: layer.mask for name, _, layer in skeleton_layers(model)}
    return model, to_stripes(without_skeletons(model), torch.zeros(1, 3, 32, 32), masks).eval()


def test_striped_network_computes_what_the_masked_one_does():
    model, striped = striped_resnet()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(striped(x), model(x), atol=1e-4, rtol=1e-4)
    assert striped.layer1[0].conv1.out_channels == 14 and striped.layer1[0].conv2.in_channels == 14
    assert striped.layer1[0].conv2.out_channels == 16  # coupled: dead filters stay as outputs
    assert len(striped.layer2[1].conv2.weight) == 0
    weights = sum(len(m.weight) * m.in_channels for m in striped.modules() if isinstance(m, StripeConv2d))
    norms = sum(2 * m.num_features for m in striped.modules() if isinstance(m, nn.BatchNorm2d))
    assert count_parameters(striped) == weights + norms + 64 * 10 + 10


def test_a_layer_keeps_one_filter_and_whole_layers_stay_convolutions():
    model = build_model("vgg16", widths=[4] * 13)
    dead, whole = torch.zeros(4, 3, 3, dtype=torch.bool), torch.ones(4, 3, 3, dtype=torch.bool)
    striped = to_stripes(model, torch.zeros(1, 3, 32, 32), {"features.conv2": dead, "features.conv3": whole})
    assert striped.features.conv2.out_channels == striped.features.conv3.in_channels == 1
    assert type(striped.features.conv3) is nn.Conv2d and type(striped.features.conv1) is nn.Conv2d


def test_description_rebuilds_the_network_from_its_state():
    _, striped = striped_resnet()
    description = json.loads(json.dumps(stripe_description(striped)))
    widths = [m.conv1.out_channels for m in striped.modules() if hasattr(m, "conv2")]
    rebuilt = apply_stripe_description(build_model("resnet20", widths=widths), description)
    rebuilt.load_state_dict(striped.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(rebuilt.eval()(x), striped(x))


def test_description_of_another_network_is_refused():
    with pytest.raises(ConfigError, match="does not exist"):
        apply_stripe_description(build_model("resnet20"), {"features.conv1": "ff"})
    with pytest.raises(ConfigError, match=r"conv1.*hexadecimal"):
        apply_stripe_description(build_model("resnet20"), {"conv1": "ff"})


def test_exports_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential()
    for i, (inputs, outputs, stride) in enumerate([(3, 6, 1), (6, 8, 2), (8, 4, 1)]):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=i == 0)
        share = [0.3, 0.3, 0.0][i]
        model.append(StripeConv2d(conv, torch.rand(outputs, 3, 3) < share))
        model.append(nn.BatchNorm2d(outputs))
    x = torch.randn(2, 3, 8, 8)
    path = tmp_path / "striped.onnx"
    torch.onnx.export(model.eval(), (x,), path, dynamo=True, verbose=False, optimize=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), atol=1e-5, rtol=1e-5)
