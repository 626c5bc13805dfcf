"""Lowered convolutions against F.conv2d, which layers are lowered, and that a training leaves no trace of it."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import apbm_core
from apbm_core.study.data.datasets import DataSplit
from apbm_core.study.data.images import Images
from apbm_core.study.networks.models import build_model
from apbm_core.study.networks.stripes import add_skeletons
from apbm_core.study.training import lowering
from apbm_core.study.training.hooks import Hook
from apbm_core.study.training.loop import train
from apbm_core.study.training.lowering import (
    ConvShape,
    ConvTimes,
    candidates,
    choose_lowered,
    is_eligible,
    lowered,
    product_conv2d,
)
from apbm_core.study.training.recipes import get_recipe

CPU = torch.device("cpu")
CLASSES = 3
RECIPE = get_recipe("fast", batch_size=8, padding=1, precision="float32", lr=0.02)
LARGE, SMALL = ("4", "8"), ("0",)  # of make_net: its 2x2 and 4x4 maps, and its first layer


@pytest.fixture(autouse=True)
def small_layers_count(monkeypatch):
    """Let tests lower layers that are quick to compute."""
    monkeypatch.setattr(lowering, "FEWEST_WEIGHTS", 64)


@pytest.fixture
def products_win(monkeypatch):
    """Every shape is timed in favour of the products; the shapes asked for are listed."""
    asked = []

    def timed(shape: ConvShape) -> ConvTimes:
        asked.append(shape)
        return ConvTimes(convolution=2.0, products=1.0)

    monkeypatch.setattr(lowering, "time_convolution", timed)
    return asked


def make_images(count: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, CLASSES, (count,), generator=generator))


def make_split() -> DataSplit:
    return DataSplit(make_images(30, 0), make_images(12, 1), make_images(9, 2), (0.5,) * 3, (0.25,) * 3, CLASSES)


def make_net(dropout: float = 0.2) -> nn.Module:
    """VGG-like: maps of 8x8, 4x4 and 2x2."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 10, 3, padding=1),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(10, CLASSES),
    )


def results(function, *arguments):
    """Output and gradients, the same upstream gradient for all."""
    leaves = [a.detach().clone(memory_format=torch.preserve_format).requires_grad_() for a in arguments]
    output = function(*leaves)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, leaves, upstream)]


@given(
    batch=st.integers(1, 3), c_in=st.integers(1, 4), c_out=st.integers(1, 4), height=st.integers(1, 5),
    width=st.integers(1, 5), bias=st.booleans(), nhwc=st.booleans(),
)  # fmt: skip
def test_outputs_and_gradients_are_the_convolutions(batch, c_in, c_out, height, width, bias, nhwc):
    generator = torch.Generator().manual_seed(height * 5 + width)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    sizes = [(batch, c_in, height, width), (c_out, c_in, 3, 3)]
    arguments = [torch.randn(s, generator=generator, dtype=torch.float64).to(memory_format=layout) for s in sizes]
    if bias:
        arguments.append(torch.randn(c_out, generator=generator, dtype=torch.float64))
    found = results(product_conv2d, *arguments)
    expected = results(lambda *a: F.conv2d(*a, padding=1), *arguments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (2, 3)])
def test_gradients_agree_with_finite_differences(size):
    arguments = [torch.randn(2, 3, *size), torch.randn(2, 3, 3, 3), torch.randn(2)]
    assert torch.autograd.gradcheck(product_conv2d, [a.double().requires_grad_() for a in arguments])


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed_are_computed(needed):
    arguments = [torch.randn(2, 3, 2, 2), torch.randn(4, 3, 3, 3), torch.randn(4)]
    for argument, wanted in zip(arguments, needed, strict=True):
        argument.requires_grad_(wanted)
    product_conv2d(*arguments).sum().backward()
    assert tuple(argument.grad is not None for argument in arguments) == needed


def test_autocast_casts_as_it_does_for_a_convolution():
    arguments = [torch.randn(4, 8, 4, 4), torch.randn(6, 8, 3, 3), torch.randn(6)]
    exact = results(lambda *a: F.conv2d(*a, padding=1), *(a.bfloat16().double() for a in arguments))
    with torch.autocast("cpu", torch.bfloat16):
        found = results(product_conv2d, *arguments)
        expected = results(lambda *a: F.conv2d(*a, padding=1), *arguments)
    for one, other, reference in zip(found, expected, exact, strict=True):
        assert one.dtype == other.dtype
        error, usual = ((t.double() - reference).norm() / reference.norm() for t in (one, other))
        assert error < 3 * usual + 1e-3
    double = [a.double() for a in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        assert product_conv2d(*double).dtype == F.conv2d(*double, padding=1).dtype == torch.float64


class Own(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, images):
        return super().forward(images) + 1


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.Conv2d(16, 16, (3, 1), padding=(1, 0)),
        nn.Conv2d(16, 16, 3, padding=0),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(16, 16, 3, padding=1),
        nn.Conv2d(7, 9, 3, padding=1),  # one pair of channels too few
        Own(16, 16, 3, padding=1),
    ],
    ids=str,
)
def test_other_layers_are_never_lowered(layer, products_win):
    assert not is_eligible(layer)
    net = nn.Sequential(nn.Conv2d(3, layer.in_channels, 1), layer).to(memory_format=torch.channels_last)
    assert choose_lowered(net, RECIPE, (4, 4), CPU, "float32", True) == () and not products_win


def test_parametrised_layers_can_be_lowered():
    fused = apbm_core.fuse(make_net(), torch.zeros(1, 3, 8, 8), keep=0.9)
    striped = add_skeletons(make_net())
    for net in (fused, striped):
        assert parametrize.is_parametrized(net[8]) and is_eligible(net[8])
        images = torch.randn(4, 3, 8, 8)
        expected = net.eval()(images)
        with lowered(net, LARGE):
            torch.testing.assert_close(net(images), expected)


def test_what_could_be_lowered_is_what_has_small_maps(products_win):
    net = make_net().to(memory_format=torch.channels_last)
    assert candidates(net, (8, 8, 8), "float32") == {
        "4": ConvShape(8, 8, 12, 4, 4, torch.float32),
        "8": ConvShape(8, 12, 10, 2, 2, torch.float32),
    }
    assert list(candidates(net, (8, 16, 16), "bfloat16").values()) == [ConvShape(8, 12, 10, 4, 4, torch.bfloat16)]


def test_a_layer_that_is_called_with_different_maps_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared, self.unused = nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in "12")

        def forward(self, images):
            return self.shared(F.max_pool2d(self.shared(self.stem(images)), 2))

    assert candidates(Twice(), (8, 4, 4), "float32") == {}


def test_looking_for_layers_leaves_network_and_random_state_alone():
    class Noise(nn.Module):
        def forward(self, images):
            return images + torch.rand_like(images)

    net = nn.Sequential(make_net(0.5), Noise())
    net[0][1].eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    torch.manual_seed(9)
    assert candidates(net, (8, 8, 8), "float32")
    drawn = torch.rand(3)
    torch.manual_seed(9)
    assert torch.equal(drawn, torch.rand(3))
    assert modes == [module.training for module in net.modules()]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(("speedup", "chosen"), [(1.24, ("4",)), (1.25, LARGE), (1.3, LARGE), (0.5, ("4",))])
def test_a_layer_is_lowered_from_a_clear_margin_on(monkeypatch, speedup, chosen):
    times = {4: ConvTimes(convolution=3.0, products=1.0), 2: ConvTimes(convolution=speedup, products=1.0)}
    monkeypatch.setattr(lowering, "time_convolution", lambda shape: times[shape.height])
    assert choose_lowered(make_net(), RECIPE, (8, 8), CPU, "float32", True) == chosen


def test_where_lowering_is_out_of_the_question_nothing_is_measured(products_win):
    net, device = make_net(), torch.device("cuda")
    for changes, place, nhwc in (({}, device, True), ({}, CPU, False), ({"compile": True}, CPU, True)):
        assert choose_lowered(net, RECIPE.model_copy(update=changes), (8, 8), place, "float32", nhwc) == ()
    assert choose_lowered(net, RECIPE.model_copy(update={"lowering": "off"}), (8, 8), CPU, "float32", True) == ()
    assert not products_win
    assert choose_lowered(net, RECIPE, (8, 8), CPU, "float32", True) == LARGE and len(products_win) == 2


def test_a_shape_is_timed_once_for_each_thread_count(monkeypatch):
    taken = []

    def least_seconds(cases, device, rounds):
        taken.append({name: len(case()) for name, case in cases.items()})
        return {"convolution": 0.3, "products": 0.1}

    monkeypatch.setattr(lowering, "least_seconds", least_seconds)
    shape = ConvShape(2, 4, 5, 2, 2, torch.float32)
    lowering._time.cache_clear()
    try:
        state = torch.get_rng_state()
        assert lowering.time_convolution(shape).speedup == pytest.approx(3.0)
        assert lowering.time_convolution(shape).is_lowered
        assert taken == [{"convolution": 2, "products": 2}]  # both gradients
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
        lowering.time_convolution(shape)
        assert len(taken) == 2 and torch.equal(state, torch.get_rng_state())
    finally:
        lowering._time.cache_clear()


def test_real_times_are_positive():
    times = lowering.time_convolution(ConvShape(2, 8, 8, 2, 2, torch.bfloat16))
    assert times.convolution > 0 and times.products > 0


def count_products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the images that products are computed for."""
    calls, real = [], product_conv2d

    def counted(images, weight, bias=None):
        calls.append(tuple(images.shape))
        return real(images, weight, bias)

    monkeypatch.setattr(lowering, "product_conv2d", counted)
    return calls


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_lowered_training_takes_the_same_course(products_win, monkeypatch, precision):
    calls, recipe = count_products(monkeypatch), RECIPE.model_copy(update={"precision": precision})
    usual, net = make_net(), make_net()
    expected = train(usual, make_split(), recipe.model_copy(update={"lowering": "off"}), 3, seed=1)
    assert expected.lowered == () and not calls
    found = train(net, make_split(), recipe, 3, seed=1)
    assert found.lowered == LARGE and len(calls) == 2 * 3 * 4  # layers, epochs, steps: validation has no gradients
    accuracy = 1e-4 if precision == "float32" else 3e-2
    for row, other in zip(found.history, expected.history, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=accuracy)
    assert list(net.state_dict()) == list(usual.state_dict())
    if precision == "float32":
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, usual.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


def is_as_before(net: nn.Module) -> bool:
    return not any("_conv_forward" in vars(module) for module in net.modules())


class Stop(Exception):
    pass


def test_nothing_is_left_after_training_or_an_error(products_win):
    net = make_net()
    assert train(net, make_split(), RECIPE, 1, seed=0).lowered and is_as_before(net)

    def stop(context):
        assert not is_as_before(context.model)
        raise Stop

    with pytest.raises(Stop):
        train(net, make_split(), RECIPE, 1, seed=0, progress=stop)
    assert is_as_before(net) and type(net[8]) is nn.Conv2d


def test_a_resumed_training_lowers_the_same_layers_bit_for_bit(products_win, monkeypatch, tmp_path):
    def run(path, stop=None):
        net, steps = make_net(), []

        def progress(context):
            steps.append(1)
            if len(steps) == stop:
                raise Stop

        try:
            result = train(net, make_split(), RECIPE, 2, seed=0, checkpoint=path, checkpoint_steps=1, progress=progress)
        except Stop:
            return None
        return net.state_dict(), result.lowered

    expected, chosen = run(None)
    assert chosen == LARGE
    run(tmp_path / "c", stop=3)
    monkeypatch.setattr(lowering, "time_convolution", lambda shape: ConvTimes(convolution=1.0, products=2.0))
    found, chosen = run(tmp_path / "c")
    assert chosen == LARGE and all(torch.equal(found[name], value) for name, value in expected.items())
    other, chosen = run(None)
    assert chosen == () and any(not torch.equal(other[name], value) for name, value in expected.items())


OUTPUTS = []


def remember_output(layer, inputs, output):
    OUTPUTS.append(tuple(output.shape[1:]))


def test_hooks_and_copies_see_an_ordinary_network(products_win, monkeypatch):
    calls = count_products(monkeypatch)

    class Look(Hook):
        copies: list

        def after_epoch(self, context):
            self.copies = [copy.deepcopy(context.model)]
            buffer = io.BytesIO()
            torch.save(context.model, buffer)
            buffer.seek(0)
            self.copies.append(torch.load(buffer, weights_only=False))
            return {"layers": [type(module).__name__ for module in context.model]}

    look, net = Look(), make_net(dropout=0.0)
    net[8].register_forward_hook(remember_output)
    result = train(net, make_split(), RECIPE, 1, seed=0, hooks=[look])
    assert set(OUTPUTS) == {(10, 2, 2)} and calls
    assert result.history[0]["layers"] == [type(module).__name__ for module in make_net()]
    calls.clear()
    images = torch.randn(4, 3, 8, 8)
    for twin in look.copies:
        torch.testing.assert_close(twin.train()(images), copy.deepcopy(net).train()(images))
        torch.export.export(twin.eval(), (images,))
    assert not calls


def test_a_lowered_layer_takes_other_inputs_as_ever():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    for images in (torch.randn(2, 8, 9, 9), torch.randn(8, 4, 4), torch.randn(1, 8, 1, 7)):
        expected = net(images)
        with lowered(net, ["0"]):
            assert torch.equal(net(images), expected)


def test_the_library_networks_that_train_quickly_are_never_measured(monkeypatch):
    monkeypatch.undo()
    for name, expected in (("resnet20", 0), ("resnet56", 0), ("vgg16", 6)):
        assert len(candidates(build_model(name, 10), (8, 32, 32), "float32")) == expected
