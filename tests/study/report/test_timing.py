"""Seconds measured under different conditions are never compared: not in a table, a claim, a figure or a plan."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.profiles import load_profile
from apbm_core.study.records import ResultsFolder
from apbm_core.study.report import curves, tables
from apbm_core.study.report.claims import claims_frame
from apbm_core.study.report.frames import points, runs_frame, timed_alike
from apbm_core.study.report.rivals import against_rivals

PUBLISHED = ResultsFolder(Path(__file__).parents[3] / "results" / "quick")
HERE = {"device": "Some CPU", "precision": "float32", "threads": 1, "side_by_side": 2, "load": 2.0}
ELSEWHERE = [
    {"device": "Another CPU"},
    {"precision": "bfloat16"},
    {"threads": 2},
    {"side_by_side": 1},
]


def timed(record, seconds, **conditions):
    """The record as if it had taken so many seconds, under the usual conditions but for these."""
    (first, *_) = record.phases
    return record.model_copy(
        update={
            "phases": [first.model_copy(update={"seconds": seconds})],
            "environment": record.environment | HERE | conditions,
        }
    )


@pytest.fixture(scope="module")
def by_method():
    return {record.config.method: record for record in PUBLISHED.read_all()}


def test_equal_conditions_are_equal_words(by_method):
    words = [timed(by_method["apbm"], 10, **other).timed_on for other in ({}, *ELSEWHERE)]
    assert words[0] == "Some CPU, float32, 1 thread a run, 2 at a time"
    assert len(set(words)) == len(words)
    assert timed(by_method["l1"], 99, load=0.5).timed_on == words[0]
    # One name stands for processors with and without AMX; it matters in bfloat16 only.
    amx, without = ({"cpu_bfloat16": found} for found in (["amx_bf16", "avx512_bf16"], ["avx512_bf16"]))
    assert timed(by_method["l1"], 1, **amx).timed_on == timed(by_method["l1"], 1, **without).timed_on
    brief = {"precision": "bfloat16"}
    assert timed(by_method["l1"], 1, **amx, **brief).timed_on != timed(by_method["l1"], 1, **without, **brief).timed_on


@pytest.mark.parametrize("other", ELSEWHERE, ids=lambda other: next(iter(other)))
def test_a_time_ratio_is_of_runs_timed_alike_only(by_method, other):
    records = [timed(by_method["apbm"], 10), timed(by_method["scratch"], 8), timed(by_method["l1"], 40, **other)]
    table = against_rivals(runs_frame(records)).set_index("rival")
    assert table.loc["slim from scratch", "time ratio"] == pytest.approx(10 / 8)
    assert table["time ratio"].isna().to_dict() == {"slim from scratch": False, "L1": True}
    assert table["difference"].notna().all()  # an accuracy does not depend on what else ran


def test_a_claim_about_time_needs_a_pair_timed_alike(by_method):
    def verdicts(**conditions):
        at_the_target = {"model": "resnet56", "target": 0.4884}
        records = [timed(by_method["apbm"], 10), timed(by_method["hrank"], 40, **conditions)]
        records = [r.model_copy(update={"config": r.config.model_copy(update=at_the_target)}) for r in records]
        table = claims_frame(records)
        table = table[(table["setting"] == "ResNet56, CIFAR-10") & table["claim"].str.endswith("HRank")]
        return table.set_index("claim")[["measured", "n", "verdict"]]

    alike, apart = verdicts(), verdicts(device="Another CPU")
    time, accuracy = "less training time than HRank", "better accuracy than HRank"
    assert (alike.loc[time, "measured"], alike.loc[time, "n"]) == ("0.25 times the time", 1)
    assert tuple(apart.loc[time]) == ("", 0, "not tested: no pair of runs timed under equal conditions")
    assert apart.loc[accuracy].equals(alike.loc[accuracy])


@pytest.mark.parametrize("other", ELSEWHERE, ids=lambda other: next(iter(other)))
def test_no_equal_time_run_is_planned_from_seconds_of_another_machine(by_method, tmp_path, other):
    values = load_profile(PUBLISHED.path.parents[1], "quick").values
    values = values | {"fallback": None, "methods": ["apbm", "scratch", "l1"], "schedules": ["equal", "equal-time"]}
    study = Study.of(tmp_path, **values)
    for name, seconds, conditions in (("apbm", 30, {}), ("scratch", 10, other), ("l1", 60, {})):
        study.results.write(timed(by_method[name], seconds, **conditions))
    assert [(config.method, config.epochs) for config in study.equal_time_configs()] == [("apbm", 6)]
    (run, reference), *others = study.without_equal_time()
    assert (run.config.method, reference.config.method, others) == ("scratch", "l1", [])
    (said,) = tables.equal_time(study)
    assert said.startswith("ResNet20, 75 %, slim from scratch, seed 0: no equal-time run")
    assert run.timed_on in said and reference.timed_on in said


def test_figures_of_time_set_apart_what_was_timed_elsewhere(by_method):
    records = [
        timed(by_method["hrank"], 60),
        timed(by_method["l1"], 120),
        timed(by_method["swp"], 6000, device="Another CPU"),
    ]
    assert timed_alike(records) == records[:2]
    assert points(runs_frame(records)).set_index("method")["timed alike"].to_dict() == {
        "hrank": True, "l1": True, "swp": False,
    }  # fmt: skip

    bars = curves.phase_times(records).axes[0]
    assert [text.get_text() for text in bars.get_yticklabels()] == ["L1", "HRank"]
    assert bars.get_title(loc="left") == "ResNet20: L1 trains longest, 2.0 times HRank"
    assert bars.get_xlabel() == "minutes a run (without 1, timed under other conditions)"

    marks = curves.accuracy_against_time(records).axes[0]
    assert "removed, L1 takes 2.0 times as long as HRank" in marks.get_title(loc="left").replace("\n", " ")
    assert "faint: timed under other conditions" in marks.get_xlabel()
    faint = {line.lines[0].get_xdata()[0]: line.lines[0].get_alpha() for line in marks.containers}
    assert faint == {1: None, 2: None, 100: 0.35}
    plt.close("all")


def test_a_lead_that_the_title_cannot_show_is_a_tie(by_method):
    def title(**accuracies):
        records = [by_method[name].model_copy(update={"test_accuracy": value}) for name, value in accuracies.items()]
        figure = curves.accuracy_curves(records)
        words = figure.axes[0].get_title(loc="left").replace("\n", " ")
        plt.close(figure)
        return words

    assert "APBM and slim from scratch tie with 89.1 %" in title(apbm=0.8906, scratch=0.8905)
    assert "APBM leads with 89.1 %" in title(apbm=0.8906, scratch=0.8889)
    assert "4 methods tie with 89.1 %" in title(apbm=0.8906, scratch=0.8905, l1=0.8904, hrank=0.8903)
