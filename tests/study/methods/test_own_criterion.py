"""A criterion in a file of the user's own: it is trained, recorded, tabulated and drawn like any other method."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from fake_task import fake_task

from apbm_core.errors import ApbmError, ConfigError
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.run import execute
from apbm_core.study.methods import get_method, label, ordered
from apbm_core.study.records import RunConfig, canonical_json
from apbm_core.study.report import curves, tables
from apbm_core.study.report.frames import points, runs_frame
from apbm_core.study.report.rivals import against_rivals

EXAMPLE = str(Path(__file__).parents[3] / "examples" / "own_criterion.py")
FIRST = """
LABEL = "the first filters"
def scores(model, layers, images, seed):
    assert images is None
    return {name: -1.0 * torch.arange(model.get_submodule(name).out_channels) for name in layers}
import torch
"""
TINY = {
    "dataset": "digits", "models": ["resnet20"], "targets": {"resnet20": [0.5]}, "epochs": 2, "train_subset": 64,
    "test_subset": 40, "recipe_overrides": {"batch_size": 32}, "device": "cpu",
}  # fmt: skip


def tiny(folder, methods, workers=1, **changes) -> Study:
    return Study.of(folder, **TINY, methods=methods, workers=workers, **changes)


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def one_thread_each():
    """However many cores there are: fast for so small a network, and the same numbers in one process and in two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apbm_core.study.grid.work.plan_workers", lambda workers, jobs, device: (min(workers, jobs), 1))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    study = tiny(tmp_path_factory.mktemp("one"), ["dense", "apbm", "l1", EXAMPLE])
    return study, study.run()


def test_it_is_in_every_table(finished):
    study, records = finished
    table = points(runs_frame(records))
    assert table["method"].tolist() == ["dense", "apbm", "l1", EXAMPLE]
    accuracy = {record.config.method: 100 * record.test_accuracy for record in records}
    assert table.set_index("method")["accuracy"].to_dict() == pytest.approx(accuracy)
    rivals = against_rivals(runs_frame(records)).set_index("rival")["difference"]
    assert rivals["weight spread"] == pytest.approx(accuracy["apbm"] - accuracy[EXAMPLE])
    assert "weight spread" in tables.styled(tables.summary(records), "a").to_html()
    assert "weight spread" in tables.styled(tables.phases(records), "b").to_html()


@pytest.mark.parametrize("plot", ["accuracy_curves", "accuracy_against_time", "training_curves"])
def test_it_is_in_the_legend_with_a_colour_and_mark_of_its_own(finished, plot):
    figure = getattr(curves, plot)(finished[1])
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    texts += [text.get_text() for text in figure.axes[0].texts]  # names beside the lines
    texts += [text.get_text() for text in figure.axes[0].get_yticklabels()] if plot == "accuracy_curves" else []
    texts = [text for text in texts if any(letter.isalpha() for letter in text)]
    assert sum(text.startswith("weight spread") for text in texts) == 1
    assert len(texts) == (3 if plot == "accuracy_curves" else 4)  # there a dashed line is the dense network
    drawn = {method: (curves.colour(method), curves.marker(method)) for method in ("dense", "apbm", "l1", EXAMPLE)}
    assert len(set(drawn.values())) == 4
    plt.close(figure)


def test_phase_times_name_it(finished):
    figure = curves.phase_times(finished[1])
    assert "weight spread" in [text.get_text() for text in figure.axes[0].get_yticklabels()]
    plt.close(figure)


def test_it_gets_the_widths_and_the_phases_of_the_other_criteria(finished):
    by_method = {record.config.method: record for record in finished[1]}
    own, l1 = by_method[EXAMPLE], by_method["l1"]
    assert own.widths == l1.widths and own.parameters == l1.parameters
    assert [(phase.name, phase.epochs, phase.shared) for phase in own.phases] == [
        (phase.name, phase.epochs, phase.shared) for phase in l1.phases
    ]
    assert own.id.startswith("resnet20-own_criterion-50-s0-")


@pytest.mark.slow
def test_two_workers_load_it_by_themselves(finished, tmp_path):
    study = tiny(tmp_path, ["l1", EXAMPLE], workers=2)
    assert {r.config.method: r.network_sha256 for r in study.run()} == {
        r.config.method: r.network_sha256 for r in finished[1] if r.config.method in ("l1", EXAMPLE)
    }


def test_what_scores_says_is_what_is_cut(tmp_path):
    """A criterion with a known answer: the kept filters of the pre-trained network are the first ones."""
    saving = FIRST.replace("    assert", "    torch.save(model.state_dict(), OUT)\n    assert")
    file = written(tmp_path / "first.py", saving + f"OUT = {str(tmp_path / 'dense.pt')!r}")
    task = _task(tmp_path, file)
    small = get_method(file).prune(task)
    dense = torch.load(tmp_path / "dense.pt")
    assert task.finetune_epochs == 0  # so that what was kept is what is there
    for name, width in task.widths.items():
        torch.testing.assert_close(small.get_submodule(name).weight, dense[f"{name}.weight"][:width])


def _task(folder, method):
    from fake_task import fake_task

    return fake_task(folder / "work", method, "resnet20", None, epochs=1, target=0.5)


def test_an_edited_file_is_a_new_run_and_the_others_are_as_they_were(tmp_path):
    file = written(tmp_path / "mine.py", FIRST)
    before = tiny(tmp_path / "r", ["l1", file]).configs()
    assert before == tiny(tmp_path / "r", ["l1", file]).configs()
    written(tmp_path / "mine.py", FIRST + "# a remark\n")
    after = tiny(tmp_path / "r", ["l1", file]).configs()
    assert before[0] == after[0] and before[1].id != after[1].id
    assert RunConfig.model_validate_json(canonical_json(after[1].model_dump(mode="json"))) == after[1]
    with pytest.raises(ConfigError, match="edited since this run was asked for"):
        execute(before[1], str(tmp_path / "r"), "cpu", 1)


def test_images_and_options_reach_the_file(tmp_path):
    text = """
from pydantic import BaseModel
import torch
LABEL, IMAGES = "mine", 7
class Options(BaseModel):
    power: int = 1
def scores(model, layers, images, seed):
    assert images.shape == (7, 3, 32, 32), images.shape
    return {name: model.get_submodule(name).weight.detach().flatten(1).norm(dim=1) for name in layers}
"""
    file = written(tmp_path / "mine.py", text)
    study = tiny(tmp_path / "r", [file], options={file: {"power": 3}})
    record = study.run()[0]
    assert record.config.options["power"] == 3 and len(record.config.options["source_sha256"]) == 64
    with pytest.raises(ConfigError, match="powr"):
        tiny(tmp_path / "r", [file], options={file: {"powr": 3}})


def test_records_outlive_the_file(tmp_path):
    assert label(str(tmp_path / "gone.py")) == "gone" and label("l1") == "L1"
    assert ordered(["z.py", "l1", "a.py", "dense", "l1"]) == ["dense", "l1", "a.py", "z.py"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read (No such file"),
        ("def scores(model, layers, images, seed): ...", "must define LABEL"),
        ("LABEL = 'mine'", "must define scores(model, layers, images, seed)"),
        ("LABEL = 'mine'\nscores = 3", "must define scores(model, layers, images, seed)"),
        ("LABEL = 'mine'\ndef scores(:", "line 2: SyntaxError"),
        ("LABEL = 'mine'\n\nimport nowhere_to_be_found", "line 3: ModuleNotFoundError"),
        ("LABEL = 'mine'\nscores = print\nIMAGES = '5'", "IMAGES = '5'"),
        ("LABEL = 'mine'\nscores = print\nFUSES = 1", "FUSES = 1 must be True or False"),
        ("LABEL = 'mine'\nscores = print\nSTARTS_FROM = 'nothing'", "STARTS_FROM = 'nothing' must be one of"),
        ("LABEL = 'mine'\nscores = print\nSCHEDULES = 'equal'", "SCHEDULES = 'equal' must be a tuple"),
        ("LABEL = 'mine'\nscores = print\nOptions = dict", "Options must be a pydantic model"),
    ],
)
def test_a_file_that_is_no_method_is_refused_before_anything_runs(tmp_path, text, words):
    file = str(tmp_path / "mine.py") if text is None else written(tmp_path / "mine.py", text)
    with pytest.raises(ConfigError) as error:
        tiny(tmp_path / "r", [file])
    assert words in str(error.value) and file in str(error.value)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("None", "no tensor for layer 'layer1.0.conv1'"),
        ("{}", "no tensor for layer 'layer1.0.conv1'"),
        ("{name: [1.0] * 16 for name in layers}", "no tensor for layer"),
        ("{name: model.get_submodule(name).weight for name in layers}", "return one number a filter"),
        ("{name: torch.ones(3) for name in layers}", "which has 16 filters"),
        ("{name: torch.full((model.get_submodule(name).out_channels,), float('nan')) for name in layers}", "finite"),
    ],
)
def test_wrong_scores_are_named(tmp_path, returned, words):
    text = f"import torch\nLABEL = 'mine'\ndef scores(model, layers, images, seed): return {returned}"
    file = written(tmp_path / "mine.py", text)
    with pytest.raises(ApbmError, match=words):
        get_method(file).prune(_task(tmp_path, file))


def test_a_criterion_may_have_its_filters_fused_once(tmp_path):
    """The filters are those of the cut; what reads them differs. Nothing is trained between the cut and the look."""
    cut, fused = (written(tmp_path / f"{name}.py", FIRST + f"FUSES = {name == 'fused'}\n") for name in ("cut", "fused"))
    networks = {}
    for path in (cut, fused):
        method = get_method(path)
        task = fake_task(tmp_path / "work", path, "resnet20", method.Options(), 2, 0.5)
        task.train = lambda *arguments, **options: None
        networks[path] = method.prune(task)
    of = {path: networks[path].get_submodule("layer1.0.conv1").weight for path in (cut, fused)}
    read = {path: networks[path].get_submodule("layer1.0.conv2").weight for path in (cut, fused)}
    assert torch.equal(of[cut], of[fused])
    assert read[cut].shape == read[fused].shape and not torch.equal(read[cut], read[fused])
