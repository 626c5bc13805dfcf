"""The controls as study methods: each ends as the slim network, and starts as it says."""

import pytest
import torch
from fake_task import fake_task
from torch import nn

from apbm_core.counting import count_parameters
from apbm_core.study.methods import get_method
from apbm_core.study.networks.models import build_model

CONTROLS = ["dirac", "passing", "reparam", "slice"]


def task_of(tmp_path, name, model="vgg16", epochs=1, **options):
    return fake_task(tmp_path, name, model, get_method(name).Options(**options), epochs, 0.9)


@pytest.mark.parametrize("model", ["vgg16", "resnet20"])
@pytest.mark.parametrize("name", CONTROLS)
def test_it_ends_as_the_slim_network(tmp_path, name, model):
    task = fake_task(tmp_path, name, model, get_method(name).Options(), 1, 0.6)
    trained = get_method(name).prune(task)
    expected = build_model(model, 10, list(task.widths.values()))
    assert count_parameters(trained) == count_parameters(expected)
    expected.load_state_dict(trained.state_dict())
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(trained.eval()(images), expected.eval()(images), rtol=1e-4, atol=1e-4)
    assert [phase.epochs for phase in task.phases] == [1]


def untrained(tmp_path, name, monkeypatch, **options):
    task = task_of(tmp_path, name, **options)
    monkeypatch.setattr(task, "train", lambda *_args, **_kwargs: None)
    return task, get_method(name).prune(task)


def test_slice_starts_as_the_corner_of_the_dense_network(tmp_path, monkeypatch):
    task, model = untrained(tmp_path, "slice", monkeypatch)
    dense = task.build()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            whole = dense.get_submodule(name).weight
            assert torch.equal(module.weight, whole[: module.weight.shape[0], : module.weight.shape[1]])


def test_dirac_starts_as_the_identity(tmp_path, monkeypatch):
    task, model = untrained(tmp_path, "dirac", monkeypatch)
    scratch = task.build(task.widths)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            both = min(module.weight.shape[:2])
            expected = nn.init.dirac_(torch.empty_like(module.weight))
            assert torch.equal(module.weight[:both], expected[:both])
            assert torch.equal(module.weight[both:], scratch.get_submodule(name).weight[both:])


def test_passing_is_apbm_without_its_fusion(tmp_path):
    apbm = get_method("apbm")
    settings = {"fuse": False, "score": "order", "reselect": False}
    options = apbm.Options(settings=settings, passing=True, collapse=False)
    without = apbm.prune(fake_task(tmp_path / "apbm", "apbm", "vgg16", options, 2, 0.9)).state_dict()
    control = get_method("passing").prune(task_of(tmp_path / "passing", "passing", epochs=2)).state_dict()
    assert without.keys() == control.keys()
    for name, value in without.items():
        torch.testing.assert_close(control[name], value, rtol=1e-4, atol=1e-6)
    fused = apbm.prune(fake_task(tmp_path / "fused", "apbm", "vgg16", apbm.Options(passing=True), 2, 0.9)).state_dict()
    assert not torch.allclose(fused["features.conv2.weight"], control["features.conv2.weight"], rtol=0.1)


def test_reparam_starts_with_the_scratch_network_among_its_branches(tmp_path, monkeypatch):
    seen = {}
    task = task_of(tmp_path, "reparam")
    monkeypatch.setattr(task, "train", lambda _phase, model, *_args: seen.update(model=model))
    get_method("reparam").prune(task)
    scratch = task.build(task.widths)
    for name, module in scratch.named_modules():
        if isinstance(module, nn.Conv2d):
            branched = seen["model"].get_submodule(name)
            assert torch.equal(branched.conv.weight, module.weight)
            assert branched.passed == min(module.weight.shape[:2])
    assert not task.notes["branches"]["left"]
