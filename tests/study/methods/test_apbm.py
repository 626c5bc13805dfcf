"""APBM as a method: its options act on the training, and a run with any of them resumes as if undisturbed."""

import pytest
import torch
from fake_task import fake_task
from torch import nn

from apbm_core.compress import fuse
from apbm_core.fusion import fused_layers
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.methods import apbm
from apbm_core.study.methods.variants import VariantSettings
from apbm_core.study.networks.models import prunable_convs
from apbm_core.study.training.hooks import Context


class Interrupted(Exception):
    pass


def run(folder, options, stop=None):
    task = fake_task(folder, "apbm", "resnet20", options, epochs=4, target=0.5)
    calls = []

    def progress(phase, context):
        calls.append(phase)
        if len(calls) == stop:
            raise Interrupted

    task._progress = progress
    return apbm.prune(task), task


@pytest.mark.parametrize(
    "options",
    [
        apbm.Options(collapse=True, bank_lr=2.0, bank_decay=0.0),
        apbm.Options(settings=VariantSettings(gain=True, bank=1.5, mass="assigned")),
        apbm.Options(settings=VariantSettings(learn_mixing=True, initial="orthogonal")),
        apbm.Options(branches=("fused", "identity"), collapse=True),
    ],
    ids=["collapse", "gain", "learned-mixing", "branches"],
)
def test_a_run_that_is_interrupted_again_and_again_ends_as_if_undisturbed(tmp_path, options):
    whole, task = run(tmp_path / "whole", options)
    for stop in (1, 3, 3, 3):  # after a step of the first epoch, the second, third and fourth; the freeze is in between
        with pytest.raises(Interrupted):
            run(tmp_path / "resumed", options, stop)
    resumed, again = run(tmp_path / "resumed", options)
    assert [row["fusion"] for row in again.history] == [row["fusion"] for row in task.history]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_collapsed_run_trains_no_bank_once_p_is_frozen(tmp_path, monkeypatch):
    sizes = []
    original = apbm.FusionHook.after_epoch

    def after_epoch(self, context):
        sizes.append(sum(conv.parametrizations.weight.original.numel() for _, conv, _ in fused_layers(self.model)))
        return original(self, context)

    monkeypatch.setattr(apbm.FusionHook, "after_epoch", after_epoch)
    model, _ = run(tmp_path, apbm.Options(collapse=True))
    slim = sum(model.get_submodule(name).weight.numel() for name in prunable_convs("resnet20"))
    assert sizes[0] > 1.9 * slim and sizes == [sizes[0], sizes[0], slim, slim]  # frozen from 60 % on


def test_banks_have_their_own_rate_and_decay_and_nothing_else_has():
    model = fuse(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.zeros(1, 3, 9, 9)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    hook = apbm.FusionHook(model, apbm.Options(bank_lr=3.0, bank_decay=0.5))
    hook.start(Context(model, optimizer, torch.device("cpu"), 1, 1))
    others, banks = optimizer.param_groups
    assert [id(p) for p in banks["params"]] == [id(model[0].parametrizations.weight.original)]
    assert banks["weight_decay"] == 0.005 and banks["lr_scale"] == 3.0 and banks["momentum"] == 0.9
    assert others["weight_decay"] == 0.01 and "lr_scale" not in others
    assert len(others["params"]) + 1 == len(list(model.parameters()))


@pytest.mark.parametrize(("model", "passes"), [("vgg16", True), ("resnet20", False), ("resnet56", False)])
def test_it_passes_its_input_on_where_no_shortcut_does(model, passes):
    targets = {model: [0.5]}
    parameters = StudyParameters.parse({"models": [model], "methods": ["apbm"], "targets": targets})
    (config,) = parameters.run_configs("cifar10")
    assert config.options.get("passing", False) is passes  # what is as before the option existed is not stated
    forced = parameters.model_copy(update={"options": {"apbm": {"passing": not passes}}})
    assert forced.run_configs("cifar10")[0].options.get("passing", False) is not passes
