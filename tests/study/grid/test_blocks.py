"""A grid of blocks: several data sets and networks, each with its own settings, one seed of all before the next."""

from pathlib import Path

import pytest

from apbm_core.errors import ConfigError
from apbm_core.study.grid.budget import in_order
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.grid.profiles import lay_over, load_profile

ROOT = Path(__file__).parents[3]
BASE = {
    "models": ["resnet20", "resnet56"],
    "targets": {"resnet20": [0.5], "resnet56": [0.5, 0.7]},
    "methods": ["dense", "apbm", "l1"],
    "own_widths": {"resnet56": {"apbm": "balanced"}},
    "seeds": [3, 1],
    "epochs": 2,
}
BLOCKS = [
    {"models": ["resnet56"], "recipe_overrides": {"crop": 24}},
    {"dataset": "cifar100", "models": ["resnet20"], "epochs": 4},
    {"models": ["resnet56"], "targets": {"resnet56": [0.7]}, "methods": ["slice"], "recipe_overrides": {"crop": 24}},
]


def test_blocks_run_in_their_order_one_seed_of_all_before_the_next():
    configs = StudyParameters.parse(BASE | {"blocks": BLOCKS}).run_configs("cifar10")
    order = list(dict.fromkeys((c.seed, c.dataset, c.model) for c in configs))
    one = [("cifar10", "resnet56"), ("cifar100", "resnet20")]
    assert order == [(seed, *bed) for seed in (3, 1) for bed in one]
    assert {(c.dataset, c.epochs, c.recipe.crop) for c in configs} == {("cifar10", 2, 24), ("cifar100", 4, None)}
    found = [(c.method, c.target, c.widths) for c in configs if c.seed == 3 and c.dataset == "cifar10"]
    assert found == [
        ("dense", 0.0, "uniform"),
        *(("apbm", share, rule) for share in (0.5, 0.7) for rule in ("uniform", "balanced")),
        *(("l1", share, "uniform") for share in (0.5, 0.7)),
        ("slice", 0.7, "uniform"),
    ]
    assert len({c.id for c in configs}) == len(configs)
    assert list(dict.fromkeys((c.seed, c.dataset) for c in in_order(configs))) == list(
        dict.fromkeys((c.seed, c.dataset) for c in configs)
    )


def test_without_blocks_the_grid_and_its_ids_are_what_they_were():
    plain = StudyParameters.parse(BASE)
    block = StudyParameters.parse(BASE | {"blocks": [{"models": ["resnet20"]}, {"models": ["resnet56"]}]})
    assert {c.id for c in plain.run_configs("cifar10")} == {c.id for c in block.run_configs("cifar10")}


def test_a_method_has_its_tuned_rate():
    configs = StudyParameters.parse(BASE | {"rates": {"l1": 0.4}}).run_configs("cifar10")
    assert {(c.method, c.recipe.lr) for c in configs} == {("dense", 0.2), ("apbm", 0.2), ("l1", 0.4)}
    with pytest.raises(ConfigError, match="lr"):
        StudyParameters.parse(BASE | {"rates": {"l1": -1.0}})


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"model": ["resnet56"]}, "model"),
        ({"models": ["resnet5"]}, "no network 'resnet5'"),
        ({"models": ["vgg16"]}, "no target is given for vgg16"),
        ({"seeds": [0]}, "no blocks or seeds of its own"),
    ],
)
def test_a_wrong_block_is_refused(block, words):
    with pytest.raises(ConfigError, match=words):
        StudyParameters.parse(BASE | {"blocks": [block]})


def test_the_curves_are_planned_as_they_are_described():
    """The paper's targets, three seeds, VGG16 before ResNet56 and CIFAR-10 before CIFAR-100, one seed of all first."""
    configs = lay_over(load_profile(ROOT, "curves"), {}).parameters.run_configs("cifar10")
    beds = list(dict.fromkeys((c.seed, c.dataset, c.model) for c in configs))
    datasets, models = ("cifar10", "cifar100"), ("vgg16", "resnet56")
    assert beds == [(seed, dataset, model) for seed in range(3) for dataset in datasets for model in models]
    claimed = {("vgg16", "cifar10"): 0.9274, ("vgg16", "cifar100"): 0.7291}
    claimed |= {("resnet56", "cifar10"): 0.4884, ("resnet56", "cifar100"): 0.4418}
    for (model, dataset), target in claimed.items():
        part = [c for c in configs if (c.model, c.dataset, c.seed) == (model, dataset, 0)]
        for method in ("apbm", "scratch", "hrank", "polarization", "swp", "dcff", "l1", "fpgm", "random"):
            assert len({c.target for c in part if c.method == method and c.widths == "uniform"}) == 5, method
        for method in ("reparam", "dirac", "slice", "depgraph", "global_l1"):
            targets = {c.target for c in part if c.method == method}
            assert target in targets and max(targets) > target, method
        assert {c.recipe.crop for c in part} == ({24} if model == "resnet56" else {None})


def test_a_study_runs_the_methods_that_only_a_block_names(tmp_path):
    parameters = StudyParameters.parse(BASE | {"dataset": "digits", "blocks": BLOCKS})
    study = Study(parameters, tmp_path)
    named = {method for block in BLOCKS for method in block.get("methods", ())}
    assert named - set(parameters.methods)
    assert study.configs() == parameters.run_configs("digits")
    assert named <= {config.method for config in study.configs()}
    starts = [study.configs([start]) for start in ("scratch", "pretrained", "sparse")]
    assert sorted(c.id for part in starts for c in part) == sorted(c.id for c in study.configs())
