"""The runner on small notebooks: what it refuses, what it leaves behind, and what it never loses."""

import html
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apbm_core.errors import ApbmError, ConfigError
from apbm_core.study.grid import parameters, profiles
from apbm_core.study.pages import index, runner, sources

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
PARAMETERS = 'profile = "quick"\nresults = "results"\nchanges = {}\n'


class Parameters(BaseModel):
    """Stands in for the study's own parameters."""

    model_config = ConfigDict(extra="forbid", strict=True)
    epochs: int = Field(3, ge=1, description="passes over the training images")
    lr: float = 0.1
    mode: str = "good"
    minutes: float | None = None

    @classmethod
    def parse(cls, values):
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None


@pytest.fixture(autouse=True)
def small_parameters(monkeypatch):
    monkeypatch.setattr(parameters, "StudyParameters", Parameters)


def write_notebook(root: Path, name: str, *cells: str) -> Path:
    """Write notebooks/<name>.ipynb with a heading, a parameters cell and code cells."""
    head = nbformat.v4.new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]})
    code = [nbformat.v4.new_code_cell(text, id=f"code-{i}") for i, text in enumerate(cells)]
    title = nbformat.v4.new_markdown_cell(f"# About {name}", id="title")
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[title, head, *code], metadata=KERNEL), path)
    return path


def write_profile(root: Path, text: str, name: str = "tiny") -> None:
    folder = root / "notebooks" / "profiles"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)


NOISY = """
import os, sys, warnings
from pathlib import Path
from types import SimpleNamespace
from IPython.display import Image, Markdown, display
print(f"changes {changes!r}, records only {os.environ['APBM_RECORDS_ONLY']}", object())
print(Path.cwd(), f"{Path.cwd()}/data/x.png", f"{Path.cwd()}-other", Path.home() / "x")
warnings.warn("careful")
"""
BARS = """
from tqdm.auto import tqdm
from tqdm import tqdm as plain
for _ in tqdm(range(3)): pass
for _ in plain(range(3)): pass
for _ in plain(iter("abc")): pass
"""
PICTURE = """
folder = Path(results) / profile / "figures"
folder.mkdir(parents=True, exist_ok=True)
pixel = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c4944415478da63f8cfc000000301010018dd8db00000000049454e44ae426082"
)
_ = (folder / "loss_curve.png").write_bytes(pixel)
display(Image(pixel))
"""
FRAGILE = """
mode = changes.get("mode")
if mode == "data":
    from apbm_core.errors import DataError
    raise DataError("cifar10 is damaged; delete it.")
if mode == "bug": 1 / 0
if mode == "dead": import os; os._exit(9)
if mode == "wait":
    import os, time
    from pathlib import Path
    Path("kernel.pid").write_text(str(os.getpid()))
    time.sleep(120)
"""


@pytest.fixture
def root(tmp_path):
    """A repository with two notebooks and the profile `tiny`."""
    root = tmp_path / "repo {1}"
    root.mkdir()
    write_profile(root, "description: Two small notebooks.\nlr: 1e-3\n")
    write_notebook(root, "01_noisy", NOISY, BARS, PICTURE)
    write_notebook(root, "02_fragile", FRAGILE, "print('alive in', results)")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_notebooks_pages_and_an_index_the_same_every_time(root, capsys):
    arguments = ["run", "--profile", "tiny", "epochs=2"]
    assert runner.main(arguments, root) == 0
    first = contents(root / "results/own")
    assert set(first) == {
        *(f"tiny/{name}.{kind}" for name in ("01_noisy", "02_fragile") for kind in ("ipynb", "html")),
        *("tiny/README.md", "tiny/index.html", "tiny/figures/loss_curve.png", "tiny/.reproduction.lock"),
        "index.html",
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "01_noisy: <cell>:7: UserWarning: careful"  # what a page warns of is said on the console, too
    assert [line.split()[0] for line in lines[2:]] == ["01_noisy", "02_fragile", "Open"]
    assert lines[-1] == "Open results/own/tiny/index.html"

    notebook = nbformat.reads(first["tiny/01_noisy.ipynb"].decode(), as_version=4)
    nbformat.validate(notebook)
    injected = notebook.cells[1]  # in the place of the source's own, which would say something else
    assert injected.metadata.tags == ["injected-parameters"]
    assert 'profile = "tiny"' in injected.source and 'changes = {"epochs": 2}' in injected.source
    assert notebook.metadata.papermill == {
        "parameters": {"profile": "tiny", "results": "results/own", "changes": {"epochs": 2}}
    }
    (printed, warned), bars, (picture,) = (cell.outputs for cell in notebook.cells[2:])
    numbers, paths = printed.text.splitlines()
    assert numbers == "changes {'epochs': 2}, records only 0 <object object at 0x...>"
    assert paths == f". ./data/x.png {root}-other ~/x"
    assert warned.text.startswith("<cell>:") and "UserWarning: careful" in warned.text
    assert bars == []
    text = first["tiny/01_noisy.ipynb"].decode().replace(f"{root}-other", "")
    for trace in (str(root), "duration", "start_time", "iopub", "widget"):
        assert trace not in text, trace

    page = first["tiny/01_noisy.html"].decode()
    assert "<object object at 0x...>" in html.unescape(page) and picture.data["image/png"].strip() in page
    index = first["tiny/index.html"].decode()
    for part in ("Two small notebooks.", 'href="01_noisy.html"', "About 02_fragile", 'src="figures/loss_curve.png"'):
        assert part in index, part
    assert 'href="tiny/index.html"' in first["index.html"].decode()

    assert runner.main(arguments, root) == 0
    second = contents(root / "results/own")
    assert [name for name in first if first[name] != second[name]] == []


def test_what_two_notebooks_warn_of_is_repeated_once(root, capsys):
    warn = "import sys; print('cifar10 is not here', file=sys.stderr); print('an ordinary line')"
    for name in ("01_noisy", "02_fragile"):
        write_notebook(root, name, warn)
    assert runner.main(["run", "--profile", "tiny"], root) == 0
    said = capsys.readouterr().out
    assert said.count("cifar10 is not here") == said.count("01_noisy: cifar10 is not here\n") == 1
    assert "an ordinary line" not in said


def test_what_a_notebook_does_not_write_any_more_is_named_and_stays(root, capsys):
    write = "from PIL import Image; Image.new('L', (2, 2)).save(f'{results}/tiny/figures/02_curve.png')"
    write_notebook(root, "02_fragile", write)
    figures = root / "results/own/tiny/figures"
    figures.mkdir(parents=True)
    for name in ("02_curve.png", "02_before.png", "01_other.png"):
        Image.new("L", (3, 3)).save(figures / name)
    arguments = ["run", "--profile", "tiny", "--only", "02_fragile"]
    assert runner.main(arguments, root) == 0
    words = "02_fragile did not write figures/02_before.png this time: remove it if it is not yours."
    assert words in capsys.readouterr().out.splitlines()
    with Image.open(figures / "02_before.png") as before:
        assert before.size == (3, 3)
    (figures / "02_before.png").unlink()
    assert runner.main(arguments, root) == 0
    assert "did not write" not in capsys.readouterr().out


def test_a_failed_notebook_stands_aside_and_the_good_one_stays(root, capsys):
    run = ["run", "--profile", "tiny", "--only", "02_fragile"]
    assert runner.main(run, root) == 0
    good = contents(root / "results/own/tiny")
    capsys.readouterr()

    assert runner.main([*run, "-p", "mode=data"], root) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[0] == "error: 02_fragile: cifar10 is damaged; delete it."
    assert "results/own/tiny/failed/02_fragile.ipynb" in error and "Traceback" not in error
    assert "DataError" in (root / "results/own/tiny/failed/02_fragile.ipynb").read_text()

    assert runner.main([*run, "-p", "mode=bug"], root) == 1
    assert "02_fragile: ZeroDivisionError in cell 4: division by zero" in capsys.readouterr().err
    failed = (root / "results/own/tiny/failed/02_fragile.ipynb").read_text()
    assert "1 / 0" in failed and str(root) not in failed

    assert runner.main([*run, "-p", "mode=dead"], root) == 1
    assert "the Python process died" in capsys.readouterr().err
    now = contents(root / "results/own/tiny")
    assert {name: now[name] for name in ("02_fragile.ipynb", "02_fragile.html")} == {
        name: good[name] for name in ("02_fragile.ipynb", "02_fragile.html")
    }
    assert b"02_fragile failed" in now["index.html"]

    assert runner.main(run, root) == 0
    assert contents(root / "results/own/tiny") == good


def test_a_signal_ends_the_kernel_and_keeps_what_is_finished(root):
    code = (
        "import sys; from pathlib import Path\n"
        "from apbm_core.study.pages import runner, sources\n"
        "sources.lay_over = lambda *values: None\n"
        "runner._train_first = lambda study: None\n"
        "sys.exit(runner.main(sys.argv[2:], Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(root), "run", "--profile", "tiny", "-p", "mode=wait"]
    repository = Path(__file__).parents[3]

    # A job in a shell's background ignores SIGINT, and hands that down to the processes it starts.
    def listen():
        return signal.signal(signal.SIGINT, signal.SIG_DFL)

    runner = subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    try:
        marker = root / "kernel.pid"
        wait_for(lambda: marker.exists() and marker.read_text(), "the second notebook to run")
        kernel = int(marker.read_text())
        runner.send_signal(signal.SIGINT)
        _, error = runner.communicate(timeout=60)
    finally:
        runner.kill()
    assert runner.returncode == 130
    assert "interrupted in 02_fragile. Finished and in results/own/tiny: 01_noisy." in error
    assert "The same command goes on from here" in error
    assert "Traceback" not in error and "WARNING" not in error
    wait_for(lambda: not is_running(kernel), "the kernel to end")
    names = set(contents(root / "results/own/tiny"))
    assert {"01_noisy.ipynb", "01_noisy.html", "index.html"} <= names
    assert not [name for name in names if "02_fragile" in name or name.endswith(".tmp")]


def wait_for(condition, what: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_second_reproduction_of_the_same_folder_is_refused(root, capsys):
    with runner.exclusive(root / "results/own/tiny"):
        assert runner.main(["run", "--profile", "tiny"], root) == 1
    error = capsys.readouterr().err
    assert f"{root}/results/own/tiny is being written by process {os.getpid()} on " in error
    with runner.exclusive(root / "results/own/tiny"):
        pass  # released


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--profile", "tiney"], "there is no profile 'tiney'; did you mean tiny? There is: tiny."),
        (["--only", "02_fragil"], "there is no notebook '02_fragil'; did you mean 02_fragile?"),
        (
            ["-p", "epoch=3"],
            "the study has no parameter 'epoch'; did you mean epochs? There is: epochs, lr, mode, minutes.",
        ),
        (["-p", "profile=quick"], "profile is set with --profile"),
        (["-p", "epochs"], "'epochs' is not of the form name=value"),
        (["-p", "epochs="], "'epochs=' is not of the form name=value"),
        (["-p", "epochs=1", "-p", "epochs=2"], "epochs is given twice"),
        (["-p", "mode=[1"], "the value of mode is not valid YAML"),
        (["-p", "epochs=three"], "epochs: Input should be a valid integer"),
        (["-p", "epochs=0"], "epochs: Input should be greater than or equal to 1"),
        (["-p", "lr=yes"], "lr: Input should be a valid number"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(root, capsys, arguments, sentence):
    assert runner.main(["run", "--profile", "tiny", *arguments], root) == 1
    assert sentence in capsys.readouterr().err
    assert not (root / "results").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("notebooks: [01_nosy]", "there is no notebook '01_nosy'; did you mean 01_noisy?"),
        ("notebooks: 01_noisy", "the notebooks of profile tiny must be a list of names"),
        ("epoch: 3", "has no parameter 'epoch'; did you mean epochs?"),
        ("epochs: 3\nepochs: 4", "found duplicate key .epochs."),
        ("- epochs", "must map parameter names to values"),
        ("epochs: [1", "not valid YAML"),
        ("epochs: 2.5", "epochs: Input should be a valid integer"),
        ("description: 3", "the description of profile tiny must be text"),
    ],
)
def test_a_wrong_profile_is_refused(root, text, sentence):
    write_profile(root, text)
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")):
        sources.prepare(root, "tiny")


def test_a_profile_cannot_take_the_name_of_the_readers_own_results(root):
    write_profile(root, "lr: 1e-3\n", name="own")
    with pytest.raises(ConfigError, match="no profile can be called 'own', for results/own holds"):
        sources.prepare(root, "own")
    assert "no profile can be called 'own'" in "".join(sources.check_sources(root))


def test_a_profile_renders_the_notebooks_that_it_names(root):
    write_profile(root, "notebooks: [02_fragile]")
    assert [source.name for source in sources.prepare(root, "tiny").notebooks] == ["02_fragile"]
    (only,) = sources.prepare(root, "tiny", only=["01_noisy"]).notebooks
    assert only.name == "01_noisy"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-3", 0.001), ("-2.5E+2", -250.0), ("1.", 1.0), (".5", 0.5), ("5", 5), ("-7", -7), ("0", 0)],
        *[("true", True), ("False", False), ("null", None), ("~", None), ("'3'", "3"), ("[0, 1e-1]", [0, 0.1])],
        *[("no", "no"), ("on", "on"), ("010", 10), ("1:30", "1:30"), ("0x10", 16), ("yes", "yes")],
        ("{params: 0.5}", {"params": 0.5}),
    ],
)
def test_values_have_the_types_they_look_like(text, value):
    parsed = profiles.parse_assignments([f"x={text}"])["x"]
    assert parsed == value and type(parsed) is type(value)


def test_report_needs_records_and_forbids_training(root, capsys):
    assert runner.main(["report", "--profile", "tiny"], root) == 1
    error = capsys.readouterr().err
    assert "results/tiny holds no recorded runs to report on; first run: make reproduce PROFILE=tiny RESULTS=" in error
    (root / "results/tiny/runs").mkdir(parents=True)
    (root / "results/tiny/runs/broken.json").write_text("{")
    assert runner.main(["report", "--profile", "tiny", "--only", "01_noisy"], root) == 0
    assert "records only 1" in (root / "results/tiny/01_noisy.ipynb").read_text()
    assert "broken.json is not a complete run record" in (root / "results/tiny/README.md").read_text()
    assert "APBM_RECORDS_ONLY" not in os.environ


def test_a_report_without_published_records_points_to_those_of_the_reader(root, capsys):
    (root / "results/own/tiny/runs").mkdir(parents=True)
    (root / "results/own/tiny/runs/mine.json").write_text("{")
    assert runner.main(["report", "--profile", "tiny"], root) == 1
    assert "your own are in results/own: make report RESULTS=results/own" in capsys.readouterr().err
    assert runner.main(["report", "--profile", "tiny", "--results", "results/own", "--only", "01_noisy"], root) == 0


def test_the_overview_of_the_published_results_does_not_list_the_readers_own(root):
    assert runner.main(["run", "--profile", "tiny", "--only", "01_noisy"], root) == 0
    assert runner.main(["run", "--profile", "tiny", "--only", "01_noisy", "--results", "results"], root) == 0
    published, own = ((root / folder / "index.html").read_text() for folder in ("results", "results/own"))
    assert 'href="tiny/index.html"' in published and "own" not in published.split("</style>")[1]
    assert 'href="tiny/index.html"' in own


def test_list_shows_profiles_and_parameters(root, capsys):
    assert runner.main(["list"], root) == 0
    text = capsys.readouterr().out
    assert "tiny       Two small notebooks." in text
    assert "epochs = 3\n      passes over the training images" in text


def test_check_accepts_clean_sources(root, capsys):
    assert runner.main(["check"], root) == 0
    assert capsys.readouterr().out == "notebooks: 0 problems\n"


def edit(root: Path, change) -> None:
    path = root / "notebooks/01_noisy.ipynb"
    notebook = json.loads(path.read_text())
    change(notebook)
    path.write_text(json.dumps(notebook))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda n: n["cells"][2].update(execution_count=1),
            "01_noisy.ipynb: cells 3 carry outputs or execution counts",
        ),
        (
            lambda n: n["cells"][3]["outputs"].append({"output_type": "stream", "name": "stdout", "text": "x"}),
            "01_noisy.ipynb: cells 4 carry outputs or execution counts",
        ),
        (lambda n: n["cells"][1].update(metadata={}), "exactly one code cell tagged `parameters`; it has 0"),
        (lambda n: n["cells"][2].update(metadata={"tags": ["parameters"]}), "`parameters`; it has 2"),
        (lambda n: n["cells"][2].update(metadata={"tags": ["injected-parameters"]}), "cell 3 was injected by a run"),
        (lambda n: n["cells"][1].update(source=PARAMETERS + "a = 2 * 3"), "may only assign literals"),
        (lambda n: n["cells"][1].update(source=PARAMETERS + "a += 3"), "line 4 is not of the form name = value"),
        (lambda n: n["cells"][1].update(source=PARAMETERS + "import os"), "line 4 is not of the form name = value"),
        (lambda n: n["cells"][1].update(source=PARAMETERS + "a = 1\na = 2"), "a is assigned twice"),
        (lambda n: n["cells"][1].update(source=PARAMETERS + "epochs = 3"), "must assign profile, results, changes and"),
        (lambda n: n["cells"][1].update(source='profile = "x"'), "nothing else, for the study's parameters are said"),
        (lambda n: n.update(metadata={}), "the metadata name no kernel"),
        (lambda n: n.update(cells=3), "is not a readable notebook"),
    ],
)
def test_check_reports(root, capsys, change, sentence):
    edit(root, change)
    assert runner.main(["check"], root) == 1
    assert sentence in capsys.readouterr().err


def test_check_reports_an_empty_folder(tmp_path, capsys):
    assert runner.main(["check"], tmp_path) == 1
    assert "holds no notebooks" in capsys.readouterr().err


def test_the_index_shows_tables_and_escapes_nothing_away(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/final_results.md").write_text("| method | accuracy |\n|---|---|\n| apbm | 0.9 |\n")
    (tmp_path / "tables/final_results.csv").write_text("method,accuracy\napbm,0.9\n")
    page = index.write_index(tmp_path, "tiny", "All < of it.").read_text()
    assert "<td>apbm</td>" in page and 'href="tables/final_results.csv"' in page and "All &lt; of it." in page


def test_an_unwritable_results_folder_is_named(root, capsys):
    (root / "results").write_text("a file where the folder should be")
    assert runner.main(["run", "--profile", "tiny"], root) == 1
    assert f"cannot write to {root}/results/own/tiny" in capsys.readouterr().err


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(ApbmError, match="x"), runner.exclusive(tmp_path):
        raise ApbmError("x")
    with runner.exclusive(tmp_path):
        pass


def test_the_index_says_which_runs_it_is_made_of(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for name, day in (("a", "2026-03-01"), ("b", "2026-03-04")):
        (tmp_path / f"runs/{name}.json").write_text(day)

    def read_record(path):
        environment = {"device": "a CPU", "commit": "0123456789" * 4 + "+changes"}
        return SimpleNamespace(finished=f"{path.read_text()}T10:00:00+00:00", environment=environment)

    monkeypatch.setattr(index, "read_record", read_record)
    text = index.write_index(tmp_path, "tiny", "").with_name("README.md").read_text()
    facts = "2 recorded runs, finished 2026-03-01 to 2026-03-04, on a CPU, from commit 0123456789+changes."
    assert f"Made from {facts}" in text
