"""A phase that does not know the target is trained once for all targets, and changes nothing of any run."""

import pytest
import torch
from fake_task import fake_task

from apbm_core.errors import ConfigError
from apbm_core.study.methods import get_method
from apbm_core.study.methods.task import Task
from apbm_core.study.training.recipes import learning_rate

RIVALS = ("polarization", "swp")


def run(folder, method, target=0.5, epochs=3, **options):
    task = fake_task(folder, method, "resnet20", get_method(method).Options(**options), epochs, target, images=8)
    return task, get_method(method).prune(task)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("method", RIVALS)
def test_the_sparse_phase_is_shared_by_all_targets_bit_for_bit(method, tmp_path, monkeypatch):
    folder = tmp_path / "shared"
    half, _ = run(folder, method, 0.5)
    more, network = run(folder, method, 0.7)
    assert [phase.shared for phase in more.phases] == [True, False, False]
    assert more.phases[0] == half.phases[0]  # trained once, its whole time charged to both
    assert len(list((folder / "work").glob(f"sparse-{method}-*/*.ckpt"))) == 1

    def apart(self, phase, model, epochs, hooks=(), recipe_overrides=None, course=(0.0, 1.0), settings=None):
        return self.train(phase, model, epochs, hooks, recipe_overrides, course)

    monkeypatch.setattr(Task, "train_shared", apart)  # as it was before phases were shared
    alone, unshared = run(tmp_path / "alone", method, 0.7)
    assert not any(phase.shared for phase in alone.phases)
    assert same(network, unshared)


class Named(Exception):
    """Raised where a shared phase would be trained, with its name."""


@pytest.mark.parametrize(("method", "setting"), [("polarization", "strength"), ("swp", "alpha"), ("hrank", None)])
def test_runs_share_a_phase_only_if_all_that_it_depends_on_is_equal(method, setting, tmp_path, monkeypatch):
    def stop(self, name, *rest):
        raise Named(name)

    def name(**changes):
        with pytest.raises(Named) as raised:
            run(tmp_path, method, **changes)
        return str(raised.value)

    monkeypatch.setattr(Task, "_once_for_all", stop)
    others = [{}, {"course": "continue"}, {"epochs": 6}, *([{setting: 1e-3}] if setting else [])]
    assert len({name(**changes) for changes in others}) == len(others)
    assert name(target=0.7) == name() == name(target=0.3)


@pytest.mark.parametrize(("method", "search"), [("polarization", "search"), ("swp", "alpha")])
def test_a_setting_that_is_searched_for_a_target_is_the_targets_own(method, search, tmp_path):
    task, _ = run(tmp_path, method, reach=search, trials=1)
    assert not any(phase.shared for phase in task.phases)


@pytest.mark.parametrize("method", [*RIVALS, "hrank"])
def test_one_course_goes_on_where_two_start_anew(method, tmp_path):
    """The rate of each epoch's last step, from the history, against the recipe's course."""
    restart, _ = run(tmp_path, method)
    going_on, _ = run(tmp_path, method, course="continue")
    recipe, steps = restart.config.recipe, 2
    one_course = [learning_rate(recipe, (2 * epoch + 1) / (3 * steps)) for epoch in range(3)]
    assert [row["lr"] for row in going_on.history] == pytest.approx(one_course)
    first = restart.phases[0].epochs
    anew = [
        learning_rate(recipe, (2 * e + 1) / (length * steps)) for length in (first, 3 - first) for e in range(length)
    ]
    assert [row["lr"] for row in restart.history] == pytest.approx(anew)


def test_a_shared_phase_comes_first(tmp_path):
    task = fake_task(tmp_path, "l1", "resnet20", get_method("l1").Options(), 2, 0.5)
    task.train("own", task.build(), 1)
    with pytest.raises(ConfigError, match="shares its phase 'pretrain' between runs, so it has to come first"):
        task.pretrained()
