"""Estimates on paper: the counts are the published ones, and the documents say what the estimate says."""

from pathlib import Path

import pytest

from apbm_core.study.grid import __main__ as command_line
from apbm_core.study.grid import paper
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.grid.profiles import load_profile
from apbm_core.study.methods import default_methods

ROOT = Path(__file__).parents[3]
VGG16 = {"models": ["vgg16"], "targets": {"vgg16": [0.9274]}, "epochs": 300, "recipe": "paper", "seeds": [0]}


def runs(**values):
    return StudyParameters.parse(VGG16 | values).run_configs("cifar10")


def test_a_dense_training_takes_six_operations_for_each_published_multiply_accumulate(monkeypatch):
    monkeypatch.setattr(paper, "count_kernels", lambda model, is_fused=False: 145)  # counted below
    dense = paper.estimate(runs(methods=["dense"]), equal_time=False)
    assert dense.operations == pytest.approx(6 * 313.2e6 * 300 * 50_000, rel=1e-3)  # methods.md 2: 313.20 M MACs
    assert dense.seconds == dense.longest == dense.operations / paper.RATE
    launches = 300 * 196 * 145 * 20e-6
    assert paper.estimate(runs(methods=["dense"]), False, rate=1e18, launch=20e-6).seconds == pytest.approx(launches)


def test_a_pretraining_counts_once_a_seed_and_equal_time_is_l1s(monkeypatch):
    monkeypatch.setattr(paper, "count_kernels", lambda model, is_fused=False: 145)
    one, all_three = (paper.estimate(runs(methods=m), False) for m in (["l1"], ["l1", "fpgm", "random"]))
    dense = paper.estimate(runs(methods=["dense"]), False)
    fine_tuning = one.operations - dense.operations / 3
    assert all_three.operations == pytest.approx(dense.operations / 3 + 3 * fine_tuning)
    assert all_three.longest == one.longest == one.seconds
    two_seeds = paper.estimate(runs(methods=["l1"], seeds=[0, 1]), False)
    assert two_seeds.operations == pytest.approx(2 * one.operations)
    scratch, with_time = (paper.estimate(runs(methods=["scratch"]), is_asked) for is_asked in (False, True))
    assert with_time.seconds == pytest.approx(scratch.seconds + one.seconds) and with_time.runs == 2
    assert (
        paper.Estimate(8, 1.0, 7200.0, 1800.0).hours(2) == 1 and paper.Estimate(8, 1.0, 7200.0, 1800.0).hours(64) == 0.5
    )


@pytest.mark.slow
def test_every_layer_of_a_network_launches_its_kernels():
    two_more = paper.count_kernels("resnet20")
    norms_and_convs = 19 * 2 * 2  # each runs forward and backward
    assert norms_and_convs + 19 * 2 < two_more < 5 * norms_and_convs  # and so do activations
    assert paper.count_kernels("resnet20", is_fused=True) > two_more


def test_a_plan_on_paper_needs_no_data(monkeypatch, capsys):
    monkeypatch.setenv("APBM_DATA", "/nowhere")
    values = ["models=[vgg16]", "targets={vgg16: [0.5]}", "methods=[dense]", "schedules=[equal]", "recipe=paper"]
    assert command_line.main(["plan", "--profile", "length", "--cards", "1", "8", "--", *values]) == 0
    assert "1 runs" in (said := capsys.readouterr().out) and "on 1 card," in said and "on 8 cards." in said


@pytest.mark.slow
def test_the_documents_say_what_the_estimate_says():
    text = (ROOT / "docs" / "clusters.md").read_text()
    gpu = StudyParameters.parse(load_profile(ROOT, "gpu").values)
    night = paper.estimate(gpu.run_configs("cifar10"), equal_time=True)
    assert night.words([1]).removeprefix("On paper: ").removesuffix(".") in text
    assert round(night.hours(1)) == 7 and "about 7 hours on paper" in (ROOT / "notebooks/profiles/gpu.yaml").read_text()
    full = StudyParameters.parse({
        "models": ["vgg16", "resnet56"], "recipe": "paper", "epochs": 300, "seeds": [0, 1, 2, 3, 4],
        "targets": {"vgg16": [0.5, 0.75, 0.9274, 0.97, 0.99], "resnet56": [0.25, 0.4884, 0.7, 0.85, 0.95]},
        "methods": [*default_methods(), "reparam", "dirac"],
        "blocks": [{"dataset": "cifar10"}, {"dataset": "cifar100"}],
    })  # fmt: skip
    words = paper.estimate(full.run_configs("cifar10"), equal_time=False).words([1, 8, 64])
    assert words.removeprefix("On paper: ").removesuffix(".") in text
    for name, count, fused in (("vgg16", 145, 184), ("resnet56", 535, 616)):
        assert (paper.count_kernels(name), paper.count_kernels(name, True)) == (count, fused)
