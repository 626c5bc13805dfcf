"""A phase that does not know the target is trained once for all targets, and changes nothing of any run."""

import pytest
import torch
from fake_task import fake_task

from apbm_core.errors import ConfigError
from apbm_core.study.methods import get_method
from apbm_core.study.methods import polarization as polarization_module
from apbm_core.study.methods import swp as swp_module
from apbm_core.study.methods.sparse import scaled_to_budget, total_rate
from apbm_core.study.methods.task import Task
from apbm_core.study.training.recipes import get_recipe, learning_rate

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


@pytest.mark.parametrize(
    ("method", "setting"), [("polarization", "strength"), ("swp", "alpha"), ("hrank", None), ("l1", None)]
)
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


@pytest.mark.parametrize("method", [*RIVALS, "hrank", "l1"])
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


def test_a_pull_scaled_to_the_budget_moves_a_weight_as_far_as_the_published_training():
    """The sums of the published learning rates by hand: SWP's 160 epochs of 782 steps, Polarization's 200 of 391."""
    swp = get_recipe("paper", **swp_module._PUBLISHED_RECIPE)
    assert total_rate(swp, 160, 50_000) == pytest.approx(160 * 782 * (0.1 * 0.5 + 0.01 * 0.25 + 0.001 * 0.25), rel=1e-3)
    polar = get_recipe("paper", **polarization_module._SPARSE_RECIPE)
    by_hand = 200 * 391 * (0.03 + 0.006 + 0.0008 + 0.00016)
    assert total_rate(polar, 200, 50_000) == pytest.approx(by_hand, rel=0.02)  # less while it warms up
    fast = get_recipe("fast")
    scaled = scaled_to_budget(1e-5, (swp, 160), (fast, 8), 50_000)
    assert scaled * total_rate(fast, 8, 50_000) == pytest.approx(1e-5 * total_rate(swp, 160, 50_000))
    assert 15e-5 < scaled < 30e-5
    part = total_rate(fast, 4, 50_000, (0.0, 0.5)) + total_rate(fast, 4, 50_000, (0.5, 1.0))
    assert part == pytest.approx(total_rate(fast, 8, 50_000))


@pytest.mark.parametrize(("method", "note"), [("polarization", "strength"), ("swp", "alpha")])
def test_the_scaled_strength_is_used_and_noted(method, note, tmp_path):
    published, _ = run(tmp_path / "published", method)
    budget, _ = run(tmp_path / "budget", method, strength_for="budget")
    assert budget.notes[note] > 1000 * published.notes[note]  # four steps to do the work of a hundred thousand


def test_what_a_norm_remembers_at_the_cut_is_forgotten_in_fine_tuning(tmp_path):
    """So recalibrating norms after a cut changes nothing that is trained, and next to nothing after an epoch."""
    task = fake_task(tmp_path, "scratch", "resnet20", get_method("scratch").Options(), 3, 0.5, images=8)
    as_cut, recalibrated = task.build(), task.build()
    for module in recalibrated.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.add_(1.0)
    task.train("one", as_cut, 3)
    task.phases.clear()  # so that the second sees the same batches
    task.train("two", recalibrated, 3)
    steps = 6
    for (name, one), other in zip(as_cut.state_dict().items(), recalibrated.state_dict().values(), strict=True):
        if name.endswith("running_mean"):
            assert torch.allclose(other - one, torch.full_like(one, 0.9**steps), atol=1e-4)
        else:
            assert torch.equal(one, other), name
