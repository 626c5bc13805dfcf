"""What a GPU would meet, as far as a CPU can tell; and, marked ``gpu``, the same on a real card.

Two stand-ins for a card. Fake tensors know their device and shape and hold no values: a step that mixes devices, or
waits for a number, fails on them. And a mode that counts waiting: how often real work reads a value out of a tensor.
"""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import apbm_core
from apbm_core.study.data.datasets import load_dataset
from apbm_core.study.methods import apbm, polarization, swp
from apbm_core.study.networks.models import build_model, prunable_convs
from apbm_core.study.networks.stripes import add_skeletons
from apbm_core.study.training import loop
from apbm_core.study.training.checkpoint import CheckpointFile
from apbm_core.study.training.device import describe_device, deterministic
from apbm_core.study.training.recipes import get_recipe

CUDA = torch.device("cuda")
READS = {"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select"}


class CountReads(TorchDispatchMode):
    """Counts the operations whose result the processor needs: on a GPU each of them waits for all that came before."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function._schema.name.replace("::", ".") in READS
        return function(*args, **(kwargs or {}))


def split_of(images: int):
    return load_dataset("digits").split("final", 0, images, 20)


def method_hooks(name: str, model: nn.Module):
    """A network and the hooks of a method that works inside the training loop."""
    prunable = prunable_convs("resnet20")
    if name == "apbm":
        model = apbm_core.fuse(model, torch.zeros(1, 3, 32, 32), {layer: 0.5 for layer in prunable})
        apbm_core.rescore(model, 0.2)
        return model, [apbm.FusionHook(model, apbm.Options(rescores_per_epoch=1))]
    if name == "swp":
        add_skeletons(model)
        return model, [swp.ShrinkSkeletons(prunable, alpha=1e-5, delta=0.01)]
    if name == "polarization":
        return model, [polarization.Polarizer(polarization.sparse_norms(model, prunable), 1e-4, 1.2)]
    return model, []


@contextlib.contextmanager
def training_of(
    name: str,
    device: torch.device,
    images: int = 40,
    precision: str = "float32",
    is_fake: bool = False,
    **changes: float,
) -> Iterator[loop.Training]:
    """A training as :func:`loop.train` sets it up, not begun; a fake one's tensors move to a card that is not there."""
    split = split_of(images)
    settings = {"batch_size": 5, "precision": precision, "channels_last": True, "lowering": "off"}
    recipe = get_recipe("fast", **(settings | changes))
    model, hooks = method_hooks(name, build_model("resnet20"))
    with FakeTensorMode(allow_non_fake_inputs=True) if is_fake else contextlib.nullcontext():
        augmentation = loop.Augmentation(padding=recipe.padding, crop=recipe.crop, flip=recipe.flip)
        source = loop.BatchSource(split.train, split.mean, split.std, recipe.batch_size, device, augmentation, 0)
        file = CheckpointFile(None, "", 60.0)
        yield loop.Training(model, split, source, recipe, 2, device, tuple(hooks), file, (0.0, 1.0))


METHODS = ["scratch", "apbm", "swp", "polarization"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_stays_on_the_card_and_reads_nothing_from_it(name, precision, monkeypatch):
    """On fake tensors of a card. Their backward pass needs the card itself; the next test has one."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    with training_of(name, CUDA, precision=precision, is_fake=True) as training:

        def backward(loss):
            assert loss.device.type == "cuda"
            for parameter in training.model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        assert {p.device.type for p in training.model.parameters()} == {"cuda"}
        for images, labels in itertools.islice(training.source.epoch(0), 3):
            assert images.device.type == labels.device.type == "cuda"
            training.train_step(images, labels)
            training.context.step += 1
        assert {b.device.type for b in training.model.buffers()} == {"cuda"}
        state = [value for values in training.context.optimizer.state.values() for value in values.values()]
        assert state and {value.device.type for value in state if isinstance(value, torch.Tensor)} == {"cuda"}


@pytest.mark.parametrize("name", ["scratch", "swp", "polarization"])  # apbm turns autocast off itself
def test_a_whole_step_reads_nothing_and_mixes_no_devices(name, monkeypatch):
    """On the meta device, whose tensors have no values either; autocast does not know it."""
    monkeypatch.setattr(loop, "autocast", lambda device, precision: contextlib.nullcontext())
    with training_of(name, torch.device("meta")) as training:
        for images, labels in itertools.islice(training.source.epoch(0), 3):
            training.train_step(images, labels)
            training.context.step += 1
        assert {p.grad.device.type for p in training.model.parameters() if p.requires_grad} == {"meta"}


def test_the_stand_in_notices_a_read_and_a_mixture_of_devices():
    with FakeTensorMode():
        value = torch.ones(3, device="cuda")
        with pytest.raises(Exception, match="data-dependent|_local_scalar_dense"):
            value.sum().item()
        with pytest.raises(Exception, match="device"):
            value + torch.ones(3)
        with pytest.raises(Exception, match="data-dependent|nonzero|dynamic"):
            value[value > 0]


@pytest.mark.parametrize("name", METHODS)
def test_longer_epochs_read_no_more(name, monkeypatch):
    """As on an accelerator, whose losses are looked at every 50 steps; scoring, once an epoch, may wait."""

    def reads(images: int) -> int:
        with training_of(name, torch.device("cpu"), images) as training, CountReads() as counter:
            training.guard = loop.LossGuard(torch.device("cpu"), loop._STEPS_BETWEEN_LOSS_CHECKS)
            training.train_epoch(lambda context: None)
        return counter.reads

    assert reads(20) == reads(60) > 0


def test_a_record_says_in_which_arithmetic_a_card_computes_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    facts = describe_device(CUDA)
    assert facts["device"] == "a card"
    assert facts["tf32"] == {
        "convolutions": torch.backends.cudnn.allow_tf32,
        "matrix_products": torch.backends.cuda.matmul.allow_tf32,
    }
    assert "tf32" not in describe_device(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_the_card_waits_for_nothing(name):
    """PyTorch's own watch over synchronisations, on the real card."""
    with training_of(name, CUDA) as training:
        batches = list(itertools.islice(training.source.epoch(0), 3))
        training.model.train()
        training.train_step(*batches[0])  # the first one loads libraries
        torch.cuda.set_sync_debug_mode("error")
        try:
            for images, labels in batches[1:]:
                training.train_step(images, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_an_interrupted_training_on_the_card_ends_as_the_undisturbed_one(tmp_path):
    """Bit for bit, with deterministic algorithms; without them only to rounding."""

    class Enough(Exception):
        pass

    def give_up(context):
        if (context.epoch, context.step) == (1, 3):
            raise Enough

    def trained(checkpoint, interrupt=False):
        torch.manual_seed(0)
        recipe = get_recipe("fast", batch_size=10, precision="float32", lowering="off")
        model = build_model("resnet20")
        with contextlib.suppress(Enough):
            loop.train(
                model, split_of(80), recipe, 2, seed=0, device="cuda", checkpoint=checkpoint, checkpoint_steps=2,
                progress=give_up if interrupt else None,
            )  # fmt: skip
        return model.state_dict()

    with deterministic(CUDA):
        reference = trained(None)
        trained(tmp_path / "cut.ckpt", interrupt=True)
        resumed = trained(tmp_path / "cut.ckpt")
    for key, value in reference.items():
        assert torch.equal(value, resumed[key]), key


@pytest.mark.gpu
def test_the_card_agrees_with_the_processor():
    """A network compressed on the card computes what it computes on the CPU."""
    torch.manual_seed(0)
    model, images = build_model("resnet20").eval(), torch.randn(4, 3, 32, 32)
    slim = apbm_core.fuse(model.to(CUDA), images.to(CUDA), {name: 0.5 for name in prunable_convs("resnet20")})
    report = apbm_core.rescore(slim, 0.3)
    assert 0 < report.mean("self_mass") < 1
    net = apbm_core.compact(slim).eval()
    torch.backends.cudnn.allow_tf32 = False
    torch.testing.assert_close(net(images.to(CUDA)).cpu(), net.cpu()(images), rtol=1e-3, atol=1e-3)


def course_of(name: str, device: torch.device, mode: bool | str = False, disturbed: str = "") -> list[float]:
    """The losses of two short epochs, a rescoring that changes P between them, at so small a rate that rounding stays
    small: at the usual one it moves them by a third."""
    torch.manual_seed(0)
    with training_of(name, device, lr=1e-3) as training:
        training.forward = loop.CompiledForward(training.model, mode) if mode else training.model
        step = training.train_step
        if disturbed == "rounding":
            generator = torch.Generator().manual_seed(1)
            for parameter in training.model.parameters():
                parameter.data.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
        if disturbed == "a step twice":
            training.train_step = lambda *batch: [step(*batch), step(*batch) if training.context.step == 1 else None]
        for _ in range(2):
            training.train_epoch(lambda context: None)
        return [row["train_loss"] for row in training.context.history]


AGREES = 2e-3  # of a loss: rounding moves it by up to 3e-4, a step too many by 1e-2 (next test)


@pytest.mark.parametrize("name", METHODS)
def test_a_course_tells_rounding_from_a_wrong_step(name):
    undisturbed = course_of(name, torch.device("cpu"))
    assert course_of(name, torch.device("cpu"), disturbed="rounding") == pytest.approx(undisturbed, rel=AGREES)
    assert course_of(name, torch.device("cpu"), disturbed="a step twice") != pytest.approx(undisturbed, rel=AGREES)


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
def test_recorded_graphs_train_as_the_step_does(name, monkeypatch):
    """torch.compile's CUDA graphs, in full float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert course_of(name, CUDA, "reduce-overhead") == pytest.approx(course_of(name, CUDA), rel=AGREES)
