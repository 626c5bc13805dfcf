"""The ablation's variants are what they say, and its table pairs what belongs together."""

import itertools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from scipy import stats

from apbm_core.errors import ConfigError
from apbm_core.study.ablation import __main__ as command
from apbm_core.study.ablation import design, figures, tables
from apbm_core.study.ablation.variants import BASE, INGREDIENTS, VARIANTS
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.grid.profiles import lay_over, load_profile
from apbm_core.study.methods.apbm import Options
from apbm_core.study.records import PUBLISHED_RESULTS, PhaseRecord, RunRecord


def test_every_variant_is_a_different_run_on_every_bed():
    for bed in design.BEDS:
        runs = design.configs(bed, VARIANTS, [10, 11])
        assert len({run.id for run in runs.values()}) == 2 * len(VARIANTS)
        assert all(run.split == "tuning" and run.seed not in (0, 1, 2) for run in runs.values())


def test_every_ingredient_has_a_colour():
    assert {variant.group for variant in VARIANTS.values()} == set(figures.GROUP_COLOURS)


def test_base_spells_out_every_option():
    """A new option must be added to BASE, or the recorded base would silently become another configuration."""
    assert Options.model_validate(BASE).model_dump(mode="json") == BASE


def test_a_variant_changes_only_what_it_names():
    changed = design.configs("resnet20", ["tau-high"], [10])["tau-high", 10].options
    base = design.configs("resnet20", ["base"], [10])["base", 10].options
    assert changed["settings"]["schedule"] == base["settings"]["schedule"] | {"start": 1.5, "end": 3.0}
    changed["settings"]["schedule"] = base["settings"]["schedule"]
    assert changed == base


CONDITIONS = {"device": "Some CPU", "precision": "float32", "threads": 1, "side_by_side": 2}


def record(bed: str, name: str, seed: int, accuracy: float, seconds: float = 1.0, **conditions) -> RunRecord:
    config = design.configs(bed, [name], [seed])[name, seed]
    return RunRecord(
        id=config.id,
        config=config,
        test_accuracy=None,
        test_loss=None,
        val_accuracy=accuracy,
        parameters=25,
        macs=30,
        dense_parameters=100,
        dense_macs=100,
        widths={},
        phases=[PhaseRecord(name="train", seconds=seconds)],
        history=[],
        environment=CONDITIONS | conditions,
        started="",
        finished="",
    )


def test_the_table_pairs_seeds_with_the_reference():
    accuracies = {
        ("scratch", 10): 0.70,
        ("scratch", 11): 0.74,
        ("base", 10): 0.71,
        ("base", 11): 0.72,
        ("base", 12): 0.9,
    }
    records = {key: record("resnet20", *key, value) for key, value in accuracies.items()}
    table = tables.variants(records).set_index("variant")
    assert list(table.index) == ["scratch", "base"]
    assert table.loc["base", "n"] == 3 and table.loc["base", "pairs"] == 2
    assert table.loc["base", "difference"] == pytest.approx((1 - 2) / 2)
    assert table.loc["scratch", "difference"] == 0 and table.loc["base", "parameters removed"] == 75
    assert table.loc["base", "verdict"] == "too few pairs (2 of 3)"
    alone = tables.variants({("base", 10): records["base", 10]}).set_index("variant")
    assert math.isnan(alone.loc["base", "difference"]) and alone.loc["base", "pairs"] == 0


def test_seconds_of_another_machine_are_not_averaged_in():
    there = {"device": "Another CPU"}
    runs = [
        ("base", 10, 60.0, {}),
        ("base", 11, 80.0, {}),
        ("base", 13, 70.0, {}),
        ("base", 12, 9.0, there),
        ("slice", 10, 9.0, there),
    ]
    records = {
        (name, seed): record("resnet20", name, seed, 0.7, seconds, **other) for name, seed, seconds, other in runs
    }
    table = tables.variants(records).set_index("variant")
    assert tuple(table.loc["base", ["training seconds", "fastest seconds", "n"]]) == (70, 60, 4)
    assert table.loc["slice", ["training seconds", "fastest seconds"]].isna().all()
    figure = figures.accuracy_against_cost(table.reset_index())
    assert figure.axes[0].get_title(loc="left") == "The most accurate, base, takes 1.0 times the shortest time"
    plt.close(figure)


def test_names_of_points_that_lie_close_do_not_cover_each_other():
    names = ["base", "scratch", "slice", "no-fusion", "l1", "dcff"]
    rows = {(name, 10): record("resnet20", name, 10, 0.7 + i / 1e3, 60 + i) for i, name in enumerate(names)}
    rows["bank-lr-4", 10] = record("resnet20", "bank-lr-4", 10, 0.72, 90)
    figure = figures.accuracy_against_cost(tables.variants(rows))
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}
    plt.close(figure)
    assert set(boxes) >= set(names)
    crossing = [(a, b) for a, b in itertools.combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    assert not crossing


def test_an_unknown_variant_or_bed_is_named(capsys):
    with pytest.raises(ConfigError, match="no variant 'bas'; did you mean 'base'"):
        design.configs("resnet20", ["bas"], [10])
    assert command.main(["--bed", "resnet2"]) == 1
    assert "no bed 'resnet2'" in capsys.readouterr().err


def test_ingredients_are_pairs_of_variants_and_differ_in_what_they_name():
    for _, on, off in INGREDIENTS:
        with_it, without = design.configs("resnet20", [on, off], [10]).values()
        assert with_it.id != without.id
    accuracies = {("base", 10): 0.71, ("base", 11): 0.72, ("base", 12): 0.73, ("base", 13): 0.9}
    accuracies |= {("no-fusion", 10): 0.70, ("no-fusion", 11): 0.70, ("no-fusion", 12): 0.70, ("slice", 10): 0.6}
    table = tables.ingredients({key: record("resnet20", *key, value) for key, value in accuracies.items()})
    table = table.set_index(["with", "without"])
    fusion = table.loc["base", "no-fusion"]
    assert fusion["each"] == pytest.approx([1, 2, 3]) and fusion["pairs"] == 3
    # two variants over three seeds: the residual of the one pair is all there is to pool, 1 / sqrt(2) with 2 degrees
    assert fusion["interval of difference"] == pytest.approx(stats.t.ppf(0.975, 2) * 1 / math.sqrt(3))
    assert fusion["verdict"] == "inconclusive"  # 2 +- 2.48
    assert table.loc["no-fusion", "slice"]["verdict"] == "too few pairs (1 of 3)"
    assert len(table) == 2


def test_the_published_ablation_reads_as_it_was_recomputed():
    """Independently recomputed from the records: the noise, and which ingredients stand the correction."""
    records = design.recorded(f"{PUBLISHED_RESULTS}/{design.FOLDER}", "resnet20")
    records = {key: record for key, record in records.items() if record.finished < "2026-11-25T20"}  # as recomputed
    spread = tables.noise(records)
    assert spread.sd == pytest.approx(0.61, abs=0.01) and spread.df == pytest.approx(70, abs=2)
    table = tables.ingredients(records).set_index(["with", "without"])
    assert table.loc[("base", "scratch"), "p"] == pytest.approx(0.004, abs=0.0005)
    shown = table[table["verdict"].isin(["above", "below"])]["difference"].round(2).to_dict()
    assert shown == {
        ("cosine", "base"): -3.44,
        ("scratch-balanced", "scratch"): 2.53,
        ("scratch-lr-2", "scratch"): 2.35,
        ("wide-1", "wide-1-similarity"): 2.02,
    }
    assert table.loc[("score-entropy", "base"), "verdict"] == "one network in 2 of 3 pairs"
    assert math.isnan(table.loc[("score-entropy", "base"), "interval of difference"])


def test_the_profile_trains_what_the_design_plans():
    """The networks that 06 writes to files are variants of the smaller bed, so that nothing is trained twice."""
    root = Path(__file__).parents[3]
    parameters = lay_over(load_profile(root, design.FOLDER), {}).parameters
    assert tuple(parameters.seeds) == design.SEEDS
    wanted = {config.id for config in parameters.run_configs("cifar10")}
    assert wanted <= {config.id for config in design.planned(["resnet20"], design.SEEDS)["resnet20"].values()}


def test_planned_runs_are_carried_out_unless_records_are_only_read(tmp_path, monkeypatch):
    monkeypatch.setitem(design.PLAN, "resnet20", ("base", "slice"))
    plan = design.planned(["resnet20"], [10])["resnet20"]
    asked = []
    monkeypatch.setattr(Study, "run", lambda self, configs: asked.extend(configs))
    parameters = StudyParameters.parse({})
    assert design.run(Study(parameters, tmp_path, records_only=True), plan) == list(plan.values()) and not asked
    study = Study(parameters, tmp_path, records_only=False)
    study.results.write(record("resnet20", "base", 10, 0.5))
    assert design.run(study, plan) == [] and asked == [plan["slice", 10]]
    with pytest.raises(ConfigError, match="no bed 'resnet2'"):
        design.planned(["resnet2"], [10])


def test_the_published_records_are_found_by_the_plan():
    root = Path(__file__).parents[3] / "results" / design.FOLDER
    plan = design.planned(design.PLAN, design.SEEDS)
    recorded = {bed: set(design.recorded(root, bed)) for bed in design.BEDS}
    assert len(recorded["resnet20"] & set(plan["resnet20"])) >= 112
    assert len(recorded["vgg16"] & set(plan["vgg16"])) >= 17
