"""The loop against a hand-written one, and interrupted trainings against uninterrupted ones, bit for bit."""

import copy
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import apbm_core
from apbm_core.errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from apbm_core.files import write_atomically
from apbm_core.study.data.batches import Augmentation, BatchSource
from apbm_core.study.data.datasets import DataSplit
from apbm_core.study.data.images import Images
from apbm_core.study.training import device as devices
from apbm_core.study.training import precision
from apbm_core.study.training.divergence import LossGuard
from apbm_core.study.training.evaluation import evaluate
from apbm_core.study.training.hooks import Hook
from apbm_core.study.training.loop import train
from apbm_core.study.training.recipes import get_recipe, learning_rate

CLASSES = 3
CPU = torch.device("cpu")
RECIPE = get_recipe("fast", batch_size=8, padding=1, precision="float32")
EPOCHS, STEPS = 3, 4  # 30 images in batches of 8, 8, 8, 6


def make_images(count: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, CLASSES, (count,), generator=generator))


def make_split(val: bool = True) -> DataSplit:
    return DataSplit(
        train=make_images(30, 0),
        val=make_images(14, 1) if val else None,
        test=make_images(10, 2),
        mean=(0.5, 0.4, 0.6),
        std=(0.2, 0.3, 0.25),
        num_classes=CLASSES,
    )


def make_net(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


def without_times(history: list[dict]) -> list[dict]:
    return [{key: v for key, v in row.items() if key not in ("seconds", "images_per_second")} for row in history]


def assert_equal_states(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def reference_loop(model: nn.Module, split: DataSplit, recipe, epochs: int, seed: int) -> list[float]:
    source = BatchSource(
        split.train, split.mean, split.std, recipe.batch_size, "cpu", Augmentation(recipe.padding), seed
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay
    )
    torch.manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)
    losses, done = [], 0
    for epoch in range(epochs):
        for images, labels in source.epoch(epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, done / (epochs * source.steps_per_epoch))
            loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            done += 1
    return losses


@pytest.mark.parametrize("overrides", [{}, {"nesterov": False, "label_smoothing": 0.0, "weight_decay": 0.01}])
def test_the_loop_is_the_ten_line_one(overrides):
    recipe, split = get_recipe("fast", **RECIPE.model_dump(exclude={"name"}) | overrides), make_split()
    expected, model = make_net(), make_net()
    losses = reference_loop(expected, split, recipe, EPOCHS, seed=11)
    result = train(model, split, recipe, EPOCHS, seed=11)
    assert_equal_states(model.state_dict(), expected.state_dict())
    sizes = torch.tensor([8, 8, 8, 6], dtype=torch.float64)
    for row, epoch_losses in zip(result.history, torch.tensor(losses).view(EPOCHS, STEPS), strict=True):
        assert row["train_loss"] == pytest.approx((epoch_losses.double() @ sizes / 30).item(), rel=1e-6)
    assert result.images == EPOCHS * 30
    assert (result.precision, result.channels_last) == ("float32", True)


def test_history_holds_what_it_says():
    model, split = make_net(), make_split()
    result = train(model, split, RECIPE, EPOCHS, seed=0)
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
    for row in result.history:
        assert row["lr"] == learning_rate(RECIPE, (row["epoch"] * STEPS + STEPS - 1) / (EPOCHS * STEPS))
        assert 0 <= row["train_accuracy"] <= 1
        assert row["images_per_second"] == pytest.approx(30 / row["seconds"])
    measured = evaluate(model, split.val, split.mean, split.std, precision="float32")
    last = result.history[-1]
    assert (last["val_accuracy"], last["val_loss"]) == (measured.accuracy, measured.loss)
    assert sum(row["seconds"] for row in result.history) == pytest.approx(result.seconds)
    assert result.images_per_second == pytest.approx(result.images / result.seconds)
    assert result.evaluation_seconds > 0


def test_without_validation_images_nothing_is_evaluated_and_test_images_are_never_touched():
    split = make_split(val=False)
    object.__setattr__(split, "test", None)
    result = train(make_net(), split, RECIPE, 1, seed=0)
    assert "val_loss" not in result.history[0]
    assert result.evaluation_seconds == 0


def test_evaluate_is_the_naive_loop_and_restores_every_modules_mode():
    model, images = make_net(), make_images(23, 3)
    mean, std = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)
    train(model, make_split(), RECIPE, 1, seed=0)
    model.train()
    model[1].eval()  # a frozen BatchNorm in a training model
    modes = [module.training for module in model.modules()]
    measured = evaluate(model, images, mean, std, batch_size=10, precision="float32")
    assert [module.training for module in model.modules()] == modes
    model.eval()
    losses, hits = [], 0
    for pixels, label in zip(images.images, images.labels, strict=True):
        x = (pixels.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
        logits = model(x.permute(2, 0, 1)[None].float())
        losses.append(-logits.log_softmax(1)[0, label].item())
        hits += int(logits.argmax() == label)
    assert measured.accuracy == hits / 23
    assert measured.loss == pytest.approx(sum(losses) / 23, rel=1e-5)


def test_evaluating_nothing_is_refused():
    with pytest.raises(DataError, match="no images"):
        evaluate(make_net(), make_images(0, 0), (0.5,) * 3, (0.2,) * 3)


class Journal(Hook):
    """Writes down every call and where it fell."""

    def __init__(self, name: str, journal: list):
        self.name, self.journal = name, journal

    def _write(self, call, context):
        self.journal.append((self.name, call, context.epoch, context.step, round(context.progress * EPOCHS * STEPS)))

    def start(self, context):
        self._write("start", context)

    def before_epoch(self, context):
        assert context.model.training
        self._write("before_epoch", context)

    def on_loss(self, context, loss):
        assert loss.dtype == torch.float32
        self._write("on_loss", context)
        return loss * 2

    def after_backward(self, context):
        assert next(context.model.parameters()).grad is not None
        self.before = next(context.model.parameters()).detach().clone()
        self._write("after_backward", context)

    def after_step(self, context):
        assert not torch.equal(self.before, next(context.model.parameters()))
        self._write("after_step", context)

    def after_epoch(self, context):
        self._write("after_epoch", context)
        return {f"calls_{self.name}": len(self.journal)}


def test_hooks_are_called_in_the_stated_order():
    journal: list = []
    result = train(
        make_net(), make_split(), RECIPE, EPOCHS, seed=0, hooks=[Journal("a", journal), Journal("b", journal)]
    )
    expected = [(name, "start", 0, 0, 0) for name in "ab"]
    for epoch in range(EPOCHS):
        expected += [(name, "before_epoch", epoch, 0, epoch * STEPS) for name in "ab"]
        for step in range(STEPS):
            for call in ("on_loss", "after_backward", "after_step"):
                expected += [(name, call, epoch, step, epoch * STEPS + step) for name in "ab"]
        expected += [(name, "after_epoch", epoch, STEPS, (epoch + 1) * STEPS) for name in "ab"]
    assert journal == expected
    assert result.history[0]["calls_b"] == result.history[0]["calls_a"] + 1


def test_a_hook_changes_the_loss_but_not_the_reported_cross_entropy():
    class Double(Hook):
        def on_loss(self, context, loss):
            return 2 * loss

    recipe = get_recipe("paper", batch_size=8, momentum=0.0, weight_decay=0.0, schedule="constant", milestones=())
    one, other = make_net(0.0), make_net(0.0)
    twice_the_rate = recipe.model_copy(update={"lr": 2 * recipe.lr})
    first = train(one, make_split(), recipe, 2, seed=0, hooks=[Double()]).history
    second = train(other, make_split(), twice_the_rate, 2, seed=0).history
    for (name, parameter), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert first[1]["train_loss"] == pytest.approx(second[1]["train_loss"], rel=1e-4)


def test_a_hook_may_not_overwrite_the_loops_own_values():
    class Liar(Hook):
        def after_epoch(self, context):
            return {"val_accuracy": 1.0}

    with pytest.raises(ConfigError, match=r"Liar\.after_epoch returned val_accuracy"):
        train(make_net(), make_split(), RECIPE, 1, seed=0, hooks=[Liar()])


class Interrupted(Exception):
    pass


class StatefulHook(Hook):
    """Behaves differently in every step, draws random numbers, and remembers an average of the gradients."""

    def __init__(self):
        self.calls, self.average, self.optimizer = 0, torch.zeros(()), None

    def start(self, context):
        self.optimizer = context.optimizer
        with torch.no_grad():  # what a resumed training must not do again
            context.model[1].weight.fill_(0.5)

    def before_epoch(self, context):
        context.model[5].train(context.epoch != 1)  # a BatchNorm that is frozen for an epoch

    def on_loss(self, context, loss):
        self.calls += 1
        return loss + 1e-2 * self.calls * torch.rand(()) * context.model[1].weight.abs().sum()

    def after_backward(self, context):
        self.average = 0.9 * self.average + 0.1 * context.model[0].weight.grad.norm()
        context.model[0].weight.grad += 1e-3 * self.average

    def after_epoch(self, context):
        return {"calls": self.calls, "average": self.average.item()}

    def state_dict(self):
        return {"calls": self.calls, "average": self.average}

    def load_state_dict(self, state):
        self.calls, self.average = state["calls"], state["average"]


class Outcome:
    """One call of train, up to its end or an interruption after ``stop`` steps, and all that it leaves behind."""

    def __init__(self, path=None, stop=None, checkpoint_steps=None, epochs=EPOCHS, **overrides):
        self.model, self.hook = make_net(), StatefulHook()
        self.steps, self.interrupted, self.result = 0, False, None

        def progress(context):
            self.steps += 1
            if self.steps == stop:
                raise Interrupted

        recipe = RECIPE.model_copy(update=overrides)
        try:
            self.result = train(
                self.model,
                make_split(),
                recipe,
                epochs,
                seed=3,
                hooks=[self.hook],
                checkpoint=path,
                identity="outcome",
                checkpoint_steps=checkpoint_steps,
                progress=progress,
            )
        except Interrupted:
            self.interrupted = True
        self.random = torch.get_rng_state()


@pytest.fixture(scope="module")
def uninterrupted():
    return Outcome()


def assert_same_outcome(found: Outcome, expected: Outcome) -> None:
    assert_equal_states(found.model.state_dict(), expected.model.state_dict())
    found_state, expected_state = found.hook.optimizer.state_dict(), expected.hook.optimizer.state_dict()
    assert found_state["param_groups"] == expected_state["param_groups"]
    for key, values in expected_state["state"].items():
        assert torch.equal(found_state["state"][key]["momentum_buffer"], values["momentum_buffer"])
    assert (found.hook.calls, found.hook.average) == (expected.hook.calls, expected.hook.average)
    assert without_times(found.result.history) == without_times(expected.result.history)
    assert found.result.images == expected.result.images
    assert torch.equal(found.random, expected.random)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(stops=st.lists(st.integers(1, 6), min_size=1, max_size=4), checkpoint_steps=st.sampled_from([None, 1, 2, 3]))
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, uninterrupted, stops, checkpoint_steps):
    path = tmp_path / "phase.ckpt"
    path.unlink(missing_ok=True)
    for stop in stops:
        Outcome(path, stop, checkpoint_steps)
        torch.manual_seed(99)  # whatever runs in between
    assert_same_outcome(Outcome(path, None, checkpoint_steps), uninterrupted)


@pytest.mark.parametrize(
    ("stop", "checkpoint_steps", "steps_left"),
    [
        (STEPS, None, 2 * STEPS),
        (STEPS + 2, None, 2 * STEPS),
        (STEPS + 2, 1, 2 * STEPS - 2),
        (STEPS + 3, 2, 2 * STEPS - 2),
    ],
)
def test_resuming_repeats_only_what_was_not_saved(tmp_path, uninterrupted, stop, checkpoint_steps, steps_left):
    path = tmp_path / "phase.ckpt"
    assert Outcome(path, stop, checkpoint_steps).interrupted
    resumed = Outcome(path, None, checkpoint_steps)
    assert resumed.steps == steps_left
    assert_same_outcome(resumed, uninterrupted)


def test_saving_by_the_clock_resumes_in_the_middle_of_an_epoch(tmp_path):
    path, steps = tmp_path / "phase.ckpt", []

    def progress(context):
        steps.append((context.epoch, context.step))
        if len(steps) == 2:
            raise Interrupted

    arguments = {"seed": 0, "checkpoint": path, "checkpoint_seconds": 0.0}
    with pytest.raises(Interrupted):
        train(make_net(), make_split(), RECIPE, 1, progress=progress, **arguments)
    train(make_net(), make_split(), RECIPE, 1, progress=progress, **arguments)
    assert steps == [(0, 1), (0, 2), (0, 3), (1, 0)]


def test_a_finished_training_returns_at_once_with_the_same_result(tmp_path):
    path = tmp_path / "phase.ckpt"
    first, again = Outcome(path), Outcome(path)
    assert again.steps == 0
    assert again.result == first.result
    assert_same_outcome(again, first)


def test_lost_steps_and_pauses_do_not_count_as_training_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class SlowSteps(Hook):
        def after_step(self, context):
            clock[0] += 1.0

    def slow_write(path, content):
        clock[0] += 100.0
        return write_atomically(path, content)

    monkeypatch.setattr("apbm_core.study.training.checkpoint.write_atomically", slow_write)
    calls = []

    def progress(context):
        calls.append(context.step)
        if len(calls) == 7:
            raise Interrupted

    arguments = {"seed": 0, "hooks": [SlowSteps()], "checkpoint": tmp_path / "c", "checkpoint_seconds": 1e9}
    arguments["checkpoint_steps"] = 2
    with pytest.raises(Interrupted):
        train(make_net(), make_split(), RECIPE, 2, progress=progress, **arguments)
    result = train(make_net(), make_split(), RECIPE, 2, **arguments)
    assert result.seconds == 2 * STEPS
    assert [row["seconds"] for row in result.history] == [STEPS, STEPS]
    assert result.images_per_second == 60 / (2 * STEPS)


@pytest.mark.parametrize("change", [{"epochs": 2}, {"lr": 0.05}, {"weight_decay": 0.0}])
def test_a_checkpoint_of_another_training_is_refused(tmp_path, change):
    Outcome(tmp_path / "c", stop=STEPS)
    with pytest.raises(CheckpointError, match="belongs to another training"):
        Outcome(tmp_path / "c", **change)


def test_a_checkpoint_of_another_network_or_other_hooks_is_refused(tmp_path):
    path, split = tmp_path / "c", make_split()
    train(make_net(), split, RECIPE, 1, seed=0, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"hooks \[\], this training has \['StatefulHook'\]"):
        train(make_net(), split, RECIPE, 1, seed=0, checkpoint=path, hooks=[StatefulHook()])
    other = make_net()
    other[4] = nn.Conv2d(6, 6, 1)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit this network.*4\.weight"):
        train(other, split, RECIPE, 1, seed=0, checkpoint=path)


class Poison(Hook):
    """Makes the network diverge at one step, in a place of the test's choosing."""

    def __init__(self, epoch, step, act):
        self.when, self.act = (epoch, step), act

    def after_step(self, context):
        if (context.epoch, context.step) == self.when:
            with torch.no_grad():
                self.act(context.model)


def overflow_second_convolution(model):
    model[4].weight.fill_(3e38)


@pytest.mark.parametrize(
    ("act", "step", "where"),
    [
        (overflow_second_convolution, 2, "the output of layer '4'"),
        (lambda model: model[5].weight.fill_(math.nan), 2, "parameter 'weight' of layer '5'"),
        (lambda model: model[9].bias.fill_(math.inf), 2, "parameter 'bias' of layer '9'"),
    ],
)
def test_divergence_names_epoch_step_layer_and_keeps_the_good_checkpoint(tmp_path, act, step, where):
    path = tmp_path / "c"
    with pytest.raises(TrainingDiverged) as error:
        train(make_net(), make_split(), RECIPE, EPOCHS, seed=0, checkpoint=path, hooks=[Poison(1, step - 1, act)])
    text = str(error.value)
    for part in [f"epoch 1, step {step} of 4", where, "Lower lr (now 0.2)", f"checkpoint, {path}, was kept"]:
        assert part in text
    good = make_net()
    train(good, make_split(), RECIPE, EPOCHS, seed=0, checkpoint=path, hooks=[Poison(9, 9, None)])
    assert all(torch.isfinite(parameter).all() for parameter in good.parameters())


@pytest.mark.parametrize("step", [1, STEPS - 1])
def test_parameters_that_diverge_are_never_saved(tmp_path, step):
    """The loss of the last step before a save may still be finite."""
    poison = Poison(0, step, lambda model: model[4].bias.fill_(math.nan))
    with pytest.raises(TrainingDiverged, match=rf"epoch 0, step {step} of 4.*parameter '4\.bias'"):
        train(
            make_net(), make_split(), RECIPE, 2, seed=0, checkpoint=tmp_path / "c", checkpoint_steps=2, hooks=[poison]
        )
    assert (tmp_path / "c").exists() == (step == STEPS - 1)  # the good state of step 2, or nothing


def test_a_loss_that_diverges_on_its_own_is_told_from_a_layer():
    class BadPenalty(Hook):
        def on_loss(self, context, loss):
            return loss + math.inf

    with pytest.raises(TrainingDiverged, match="step 0 of 4.*the loss itself"):
        train(make_net(), make_split(), RECIPE, 1, seed=0, hooks=[BadPenalty()])


@given(
    bad=st.sets(st.integers(0, 29)),
    interval=st.integers(1, 12),
)
def test_a_guard_that_looks_seldom_still_names_the_first_bad_step(bad, interval):
    guard = LossGuard(CPU, interval)
    seen_at = None
    for step in range(30):
        loss = torch.tensor(math.nan if step in bad else 1.0)
        if guard.saw_non_finite(loss, step) and seen_at is None:
            seen_at = step
            assert guard.first_bad_step() == min(bad)
    assert guard.first_bad_step() == (min(bad) if bad else None)
    looks = [step for step in range(30) if step % interval == interval - 1 and bad and step >= min(bad)]
    assert seen_at == (looks[0] if looks else None)


def test_a_seldom_asked_guard_stops_the_training_before_the_epochs_end_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("apbm_core.study.training.loop.LossGuard", lambda device, interval: LossGuard(device, 50))
    poison = Poison(1, 0, overflow_second_convolution)
    with pytest.raises(TrainingDiverged, match="epoch 1, step 1 of 4"):
        train(make_net(), make_split(), RECIPE, 2, seed=0, checkpoint=tmp_path / "c", hooks=[poison])
    model = make_net()
    train(model, make_split(), RECIPE, 2, seed=0, checkpoint=tmp_path / "c", hooks=[Poison(9, 9, None)])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_bfloat16_trains_float32_weights():
    model = make_net()
    recipe = RECIPE.model_copy(update={"precision": "bfloat16"})
    result = train(model, make_split(), recipe, 1, seed=0)
    exact = train(make_net(), make_split(), RECIPE, 1, seed=0)
    assert result.precision == "bfloat16"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert result.history[0]["train_loss"] != exact.history[0]["train_loss"]
    assert result.history[0]["train_loss"] == pytest.approx(exact.history[0]["train_loss"], rel=0.05)


@pytest.mark.parametrize(("channels_last", "format"), [(True, torch.channels_last), (False, torch.contiguous_format)])
def test_memory_layout_reaches_weights_and_images(channels_last, format):
    seen = []
    model = make_net()
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous(memory_format=format)))
    recipe = RECIPE.model_copy(update={"channels_last": channels_last})
    assert train(model, make_split(), recipe, 1, seed=0).channels_last is channels_last
    assert model[4].weight.is_contiguous(memory_format=format)
    assert all(seen)


def test_a_resumed_training_keeps_the_arithmetic_it_began_with(tmp_path, monkeypatch):
    recipe = RECIPE.model_copy(update={"precision": "auto"})
    arguments = {"seed": 0, "checkpoint": tmp_path / "c"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    train(make_net(), make_split(), recipe, 1, **arguments)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(precision, "bfloat16_speedup", lambda device: 2.0)
    assert precision.choose_precision(CPU)[0] == "bfloat16"
    assert train(make_net(), make_split(), recipe, 1, **arguments).precision == "float32"


@pytest.mark.parametrize(
    ("name", "says"),
    [("gpu", "unknown; allowed: auto, cpu, cuda, mps"), ("cuda:99", "sees [0-9]+ CUDA GPUs"), (3.5, "unknown")],
)
def test_devices_that_are_not_there_are_refused(name, says):
    with pytest.raises(ConfigError, match=says):
        devices.pick_device(name)


def test_describe_device_and_peak_memory():
    facts = devices.describe_device(CPU)
    assert (facts["type"], facts["torch"], facts["threads"]) == ("cpu", torch.__version__, torch.get_num_threads())
    assert facts["device"]
    before = devices.peak_memory_bytes(CPU)
    held = torch.ones(before // 4 + 5_000_000)  # more than ever was in use, so it must show
    assert held.nbytes <= devices.peak_memory_bytes(CPU) <= 1.1 * (before + held.nbytes)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel's list of a processor's flags")
def test_the_processors_bfloat16_is_what_the_kernel_lists(monkeypatch):
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    listed = set(flags.group(1).split()) if flags else set()
    assert set(devices.cpu_bfloat16()) == {"amx_bf16", "avx512_bf16"} & listed
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False, "avx": True})
    assert devices.describe_device(CPU)["cpu_bfloat16"] == ["avx512_bf16"]


class Compiler:
    """Stands in for torch.compile: works, or fails when it is first used, as a missing C++ compiler does."""

    def __init__(self, works):
        self.works, self.calls, self.mode = works, 0, None

    def __call__(self, model, mode):
        self.mode = mode

        def forward(images):
            self.calls += 1
            if not self.works:
                raise RuntimeError("no C++ compiler")
            return model(images)

        return forward


def test_compiling_that_fails_is_a_warning_and_changes_nothing(monkeypatch):
    compiler, model, expected = Compiler(False), make_net(), make_net()
    monkeypatch.setattr(torch, "compile", compiler)
    with pytest.warns(RuntimeWarning, match="torch.compile failed .no C.. compiler."):
        train(model, make_split(), RECIPE.model_copy(update={"compile": True}), 1, seed=0)
    assert compiler.calls == 1
    train(expected, make_split(), RECIPE, 1, seed=0)
    assert_equal_states(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize(("asked", "mode"), [(True, "default"), ("reduce-overhead", "reduce-overhead")])
def test_compiling_is_used_in_every_step_and_keeps_the_names(asked, mode, monkeypatch):
    compiler, model = Compiler(True), make_net()
    names = list(model.state_dict())
    monkeypatch.setattr(torch, "compile", compiler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, make_split(), RECIPE.model_copy(update={"compile": asked}), 2, seed=0)
    assert compiler.calls == 2 * STEPS and compiler.mode == mode
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_the_real_compiler_trains_about_the_same(mode):
    model, expected = make_net(0.0), make_net(0.0)
    train(model, make_split(), RECIPE.model_copy(update={"compile": mode}), 1, seed=0)
    train(expected, make_split(), RECIPE, 1, seed=0)
    for (name, tensor), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, "3"])
def test_epochs_must_be_a_whole_number(epochs):
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        train(make_net(), make_split(), RECIPE, epochs, seed=0)


def test_a_network_with_the_wrong_number_of_classes_is_refused():
    model = make_net()
    model[9] = nn.Linear(6, CLASSES + 1)
    with pytest.raises(ConfigError, match="build it with num_classes=3"):
        train(model, make_split(), RECIPE, 1, seed=0)


def test_fused_networks_resume_exactly_too(tmp_path):
    class Rescore(Hook):
        def before_epoch(self, context):
            apbm_core.rescore(context.model, context.progress)

    def run(path, stop=None):
        torch.manual_seed(0)
        model = apbm_core.fuse(make_net(0.0), torch.zeros(1, 3, 8, 8), keep=0.5)
        calls = []

        def progress(context):
            calls.append(1)
            if len(calls) == stop:
                raise Interrupted

        try:
            arguments = {"seed": 0, "hooks": [Rescore()], "checkpoint": path, "checkpoint_steps": 1}
            train(model, make_split(), RECIPE, EPOCHS, progress=progress, **arguments)
        except Interrupted:
            pass
        return {name: copy.deepcopy(value) for name, value in model.state_dict().items()}

    expected = run(None)
    for stop in (2, 3):
        run(tmp_path / "c", stop)
    found = run(tmp_path / "c")
    tensors = [name for name, value in expected.items() if isinstance(value, torch.Tensor)]
    assert {name: v for name, v in found.items() if name not in tensors} == {
        name: v for name, v in expected.items() if name not in tensors
    }
    assert_equal_states({name: found[name] for name in tensors}, {name: expected[name] for name in tensors})
    assert any("matrix" in name for name in tensors)
