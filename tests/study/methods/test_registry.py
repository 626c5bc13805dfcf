"""A method is one file: what the registry finds, and that an eleventh file is in a study, its tables and its plots."""

import re
import sys
from pathlib import Path

import matplotlib.markers
import matplotlib.pyplot as plt
import pytest

from apbm_core.errors import ConfigError
from apbm_core.study import methods
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.parameters import StudyParameters
from apbm_core.study.methods import all_methods, default_methods, get_method, label, ordered
from apbm_core.study.report import curves, tables
from apbm_core.study.report.frames import history_frame, phase_frame, points, runs_frame
from apbm_core.study.report.rivals import against_rivals

ELEVENTH = '''
"""The largest weight decides."""
LABEL = "largest weight"
SUMMARY, SOURCE = "filters without a large weight go", "a test"
PLACE, COLOUR, MARKER = 70.5, "#123456", "d"

def scores(model, layers, images, seed):
    return {name: model.get_submodule(name).weight.detach().abs().flatten(1).amax(1) for name in layers}
'''
TINY = {
    "dataset": "digits", "models": ["resnet20"], "targets": {"resnet20": [0.5]}, "epochs": 2, "train_subset": 32,
    "test_subset": 20, "recipe_overrides": {"batch_size": 32}, "device": "cpu", "workers": 1,
}  # fmt: skip


def add(folder: Path, monkeypatch, **files: str) -> None:
    """Put files into the package's folder, as far as the import system can tell."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"{methods.__name__}.{name}", raising=False)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])


@pytest.fixture
def eleventh(tmp_path, monkeypatch):
    before = list(all_methods())
    add(tmp_path, monkeypatch, eleventh=ELEVENTH)
    yield before
    sys.modules.pop(f"{methods.__name__}.eleventh", None)


def test_every_file_that_defines_a_label_is_a_method_and_no_other():
    folder = Path(methods.__path__[0])
    defining = {path.stem for path in folder.glob("*.py") if re.search(r"^LABEL = ", path.read_text(), re.MULTILINE)}
    assert set(all_methods()) == defining and {"dense", "apbm", "l1"} <= defining


def test_the_studys_own_methods_are_told_apart_and_say_where_they_come_from():
    found = list(all_methods().values())
    for attribute in ("label", "place", "colour", "summary"):
        values = [getattr(method, attribute) for method in found]
        assert len(set(values)) == len(values) and all(value not in ("", None) for value in values), attribute
    assert all(method.source for method in found)
    assert all(method.marker in matplotlib.markers.MarkerStyle.markers for method in found if method.marker)


def test_a_further_file_takes_its_place_in_the_order_and_among_the_defaults(eleventh):
    found = list(all_methods())
    assert [name for name in found if name != "eleventh"] == eleventh
    assert found[found.index("l1") :][:2] == ["l1", "eleventh"] and found.index("eleventh") < found.index("fpgm")
    assert ordered(["fpgm", "a.py", "eleventh", "l1"]) == ["l1", "eleventh", "fpgm", "a.py"]
    assert label("eleventh") == "largest weight" and get_method("eleventh").source == "a test"
    assert StudyParameters().methods == default_methods() and "eleventh" in default_methods()


def test_a_method_that_is_no_default_must_be_named(tmp_path, monkeypatch):
    add(tmp_path, monkeypatch, aside=ELEVENTH + "DEFAULT = False\n")
    assert "aside" in all_methods() and "aside" not in StudyParameters().methods
    assert "aside" in StudyParameters(methods=["aside"]).methods


def test_a_further_file_is_in_a_study_and_every_table_legend_and_curve(eleventh, tmp_path, monkeypatch):
    monkeypatch.setattr("apbm_core.study.grid.grid.plan_workers", lambda workers, jobs, device: (1, 1))
    study = Study.of(tmp_path / "study", **TINY, methods=["dense", "apbm", "l1", "eleventh"])
    records = study.run()
    by_method = {record.config.method: record for record in records}
    assert by_method["eleventh"].widths == by_method["l1"].widths and by_method["eleventh"].config.options == {}
    frame = runs_frame(records)
    assert points(frame)["method"].tolist() == ["dense", "apbm", "l1", "eleventh"]
    assert "largest weight" in against_rivals(frame)["rival"].tolist()
    assert "eleventh" in set(phase_frame(records)["method"]) & set(history_frame(records)["method"])
    for table in (tables.summary, tables.phases, tables.rivals):
        assert "largest weight" in tables.styled(table(records), "a").to_html()
    for plot in (curves.accuracy_curves, curves.accuracy_against_time):
        figure = plot(records)
        (axis,) = figure.axes
        names = [text.get_text() for text in [*axis.texts, *axis.get_yticklabels()]]
        assert names.count("largest weight") == 1  # beside its line
        plt.close(figure)
    figure = curves.training_curves(records)
    (legend,) = figure.legends
    handles = dict(zip([text.get_text() for text in legend.get_texts()], legend.legend_handles, strict=True))
    assert handles["largest weight"].get_color() == "#123456"
    plt.close(figure)
    figure = curves.phase_times(records)
    assert "largest weight" in [text.get_text() for text in figure.axes[0].get_yticklabels()]
    plt.close(figure)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("PLACE = 'after l1'", "PLACE = 'after l1' must be a number"),
        ("COLOUR = 'red'", "COLOUR = 'red' must be of the form '#rrggbb'"),
        ("DEFAULT = 'no'", "DEFAULT = 'no' must be True or False"),
        ("CHOOSES_WIDTHS = 1", "CHOOSES_WIDTHS = 1 must be True or False"),
        ("SUMMARY = 3", "SUMMARY = 3 must be text"),
        ("scores = None", "must define scores"),
    ],
)
def test_a_file_that_says_something_impossible_is_refused_by_name(tmp_path, monkeypatch, line, words):
    add(tmp_path, monkeypatch, wrong=ELEVENTH + line)
    with pytest.raises(ConfigError) as error:
        all_methods()
    assert words in str(error.value) and str(tmp_path / "wrong.py") in str(error.value)
    sys.modules.pop(f"{methods.__name__}.wrong", None)
