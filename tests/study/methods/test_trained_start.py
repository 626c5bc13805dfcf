"""Runs that start from a dense network that is trained already."""

import pytest
import torch
from fake_task import fake_task

from apbm_core.errors import ConfigError
from apbm_core.fusion import FusionSettings
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.methods import get_method, random
from apbm_core.study.methods.narrowing import choose_filters
from apbm_core.study.methods.ranking import seen
from apbm_core.study.methods.task import Task
from apbm_core.study.training.loop import train
from apbm_core.trained import fuse_trained

TINY = {"dataset": "digits", "models": ["resnet20"], "targets": {"resnet20": [0.5]}, "epochs": 1, "train_subset": 64,
        "test_subset": 20, "device": "cpu", "start_epochs": 2, "recipe_overrides": {"lr": 0.01},
        "start_recipe": {"lr": 0.1}}  # fmt: skip


def started(folder, method, epochs=1):
    plain = fake_task(folder, method, "resnet20", get_method(method).Options(), epochs, 0.5, images=8)
    recipe = plain.config.recipe.model_copy(update={"lr": 0.1})
    config = plain.config.model_copy(update={"start_epochs": 2, "start_recipe": recipe})
    return Task(config, plain.split, plain._results, plain.options, plain.device)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The trained network, by the training loop itself."""
    task = started(tmp_path_factory.mktemp("dense"), "l1")
    model = task._fresh()
    train(model, task.split, task.config.start_recipe, 2, seed=0)
    return model


def filters(weight):
    return {row.numpy().tobytes() for row in weight.detach().flatten(1)}


STARTING = ["dense", "apbm", "slice", "l1", "hrank", "polarization", "swp", "dcff", "depgraph", "entropy_cut"]


@pytest.mark.parametrize("method", STARTING)
def test_the_first_training_of_a_run_starts_from_the_trained_network(method, dense, tmp_path, monkeypatch):
    """Stopped before its first step, each has the trained network's filters, or a part of them, and its statistics."""
    seen = {}

    def look(self, phase, model, *rest):
        seen.setdefault("model", model)
        raise InterruptedError

    task = started(tmp_path, method)
    monkeypatch.setattr(Task, "_record", lambda *arguments, **options: None)
    original = Task._run
    monkeypatch.setattr(
        Task, "_run", lambda self, name, *rest: (original if name.startswith("start-") else look)(self, name, *rest)
    )
    with pytest.raises(InterruptedError):
        get_method(method).prune(task)
    model, name = seen["model"], "layer1.0.conv1"
    conv = model.get_submodule(name)
    weight = conv.parametrizations.weight.original if hasattr(conv, "parametrizations") else conv.weight
    assert filters(weight) <= filters(dense.get_submodule(name).weight)
    before = dict(dense.named_buffers())["norm1.running_mean"]
    norm = next(value for key, value in model.named_buffers() if key.startswith("norm1") and key.endswith("_mean"))
    assert torch.equal(norm, before) and norm.abs().sum() > 0
    assert task.notes["start"]["epochs"] == 2 and 0 <= task.notes["start"]["train_accuracy"] <= 1


def test_it_is_trained_once_for_all_methods_and_charged_to_none(tmp_path):
    methods = ["dense", "apbm", "scratch", "l1", "swp"]
    records = Study.of(tmp_path, **TINY, methods=methods, seeds=[0]).run()
    assert len(list(tmp_path.glob("work/start-*/*.ckpt"))) == 1
    for record in records:
        assert sum(phase.epochs for phase in record.phases) == record.config.epochs == 1
        assert not any(phase.name.startswith("start") for phase in record.phases)
        is_slim = record.config.method == "scratch"
        assert ("start" in record.notes) != is_slim
        assert record.config.start_epochs == (0 if is_slim else 2)
    scratch = next(record for record in records if record.config.method == "scratch")
    alone = {name: value for name, value in TINY.items() if not name.startswith("start")}
    (usual,) = StudyParameters.parse(alone | {"methods": ["scratch"], "seeds": [0]}).run_configs("digits")
    assert scratch.id == usual.id, "what starts slim is the run that it always was"
    again = Study.of(tmp_path, **TINY, methods=methods, seeds=[0]).run()
    assert [record.finished for record in again] == [record.finished for record in records]


def test_a_trained_network_does_not_pass_its_input_on():
    def options(**apbm):
        values = TINY | {
            "models": ["vgg16"],
            "targets": {"vgg16": [0.5]},
            "methods": ["apbm"],
            "options": {"apbm": apbm},
        }
        return StudyParameters.parse(values).run_configs("digits")[0].options

    assert not options().get("passing")
    with pytest.raises(ConfigError, match="passing = True would bury what a trained network has learnt"):
        options(passing=True)


def test_a_recipe_of_a_start_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="start_recipe is of a network that is trained already; set start_epochs"):
        StudyParameters.parse(TINY | {"start_epochs": 0})
    with pytest.raises(ConfigError, match="momentums"):
        StudyParameters.parse(TINY | {"start_recipe": {"momentums": 1}})


def test_fusing_once_keeps_the_filters_of_the_cut_and_changes_what_reads_them(tmp_path):
    """Against the verb of the library, given the same filters and images; and against the control."""
    held_out = {**TINY, "split": "tuning", "methods": ["fused_once", "entropy_cut", "l1"], "seeds": [0]}
    records = {record.config.method: record for record in Study.of(tmp_path, **held_out).run()}
    assert all(0 <= record.notes["after_cut"]["val_accuracy"] <= 1 for record in records.values())
    networks = {}
    for method in ("fused_once", "entropy_cut"):
        task = started(tmp_path, method)
        task.train = lambda *arguments, **options: None
        networks[method] = get_method(method).prune(task)
        dense = task.build()
    kept = choose_filters(dense, task.widths, FusionSettings())
    first, reader = "layer1.0.conv1", "layer1.0.conv2"
    for model in networks.values():
        assert torch.equal(model.get_submodule(first).weight, dense.get_submodule(first).weight[kept[first]])
    cut = dense.get_submodule(reader).weight[:, kept[first]]
    assert torch.equal(networks["entropy_cut"].get_submodule(reader).weight, cut)
    how = {"keep": task.widths, "groups": False, "choose": "weights"}
    by_the_library = fuse_trained(dense, task.example_inputs, seen(task), **how)
    for name, value in by_the_library.state_dict().items():
        torch.testing.assert_close(networks["fused_once"].state_dict()[name], value, msg=name)
    assert not torch.equal(by_the_library.get_submodule(reader).weight, cut)


def test_a_choice_by_responses_is_the_librarys(tmp_path):
    task = started(tmp_path, "fused_by_responses")
    task.train = lambda *arguments, **options: None
    small = get_method("fused_by_responses").prune(task)
    by_the_library = fuse_trained(
        task.build(), task.example_inputs, seen(task), keep=task.widths, groups=False, choose="responses"
    )
    for name, value in by_the_library.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, msg=name)


def test_random_filters_are_fused_and_others_than_those_of_relative_entropy(tmp_path):
    """The control has its filters from the lot alone, and a reader that is not the one that was cut."""
    task = started(tmp_path, "random_fused")
    task.train = lambda *arguments, **options: None
    small, dense = get_method("random_fused").prune(task), task.build()
    drawn = random.scores(dense, ["layer1.0.conv1"], seed=task.config.seed)["layer1.0.conv1"]
    kept = drawn.topk(task.widths["layer1.0.conv1"]).indices.sort().values
    assert torch.equal(small.get_submodule("layer1.0.conv1").weight, dense.get_submodule("layer1.0.conv1").weight[kept])
    reader = "layer1.0.conv2"
    assert not torch.equal(small.get_submodule(reader).weight, dense.get_submodule(reader).weight[:, kept])


def test_nothing_is_noted_of_a_cut_where_no_images_are_held_out(tmp_path):
    (record,) = Study.of(tmp_path, **TINY, methods=["entropy_cut"], seeds=[0]).run()
    assert "after_cut" not in record.notes
