"""The benchmark's harness: what it computes from the clock, what it keeps, and that every section runs. No timings."""

import copy
import json
import os
from types import SimpleNamespace

import pytest
import torch

import apbm_core.study.bench.__main__ as command
from apbm_core.compress import fuse
from apbm_core.errors import ApbmError, RecordError
from apbm_core.similarity import log_similarity, pairwise_distances, relative_entropy
from apbm_core.study.bench import measure
from apbm_core.study.bench.__main__ import SECTIONS, BenchFile, file_name, main, run_sections
from apbm_core.study.bench.deployment import deployment
from apbm_core.study.bench.measure import (
    Measured,
    Settings,
    Table,
    goal,
    interleave,
    render_markdown,
    render_text,
)
from apbm_core.study.bench.profile import KINDS, kind_of, profile_step
from apbm_core.study.bench.scoring import literal_importance
from apbm_core.study.bench.steps import TrainingStep, fastest_step, network, random_split, recipe_for
from apbm_core.study.networks.models import build_model
from apbm_core.study.training import lowering
from apbm_core.study.training.loop import train

CPU = torch.device("cpu")
TINY = Settings(
    CPU, threads=1, quick=True, batch_size=2, seconds=0.0, rounds=(1, 1), shortest=0.0, score_images=2,
    source_images=64, throughput_batch=2,
)  # fmt: skip


class Clock:
    """Stands in for the time module; the machine slows down by half in every round."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def perf_counter(self) -> float:
        return self.now

    def case(self, name: str, seconds: float, slowdown: float = 1.0):
        state = {"factor": 1.0}

        def run():
            self.log.append(name)
            self.now += seconds * state["factor"]
            state["factor"] *= slowdown

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_ratios_are_taken_within_a_round_so_drift_cancels(clock):
    settings = Settings(CPU, 1, rounds=(4, 4), shortest=0.0)
    seconds = interleave({"a": clock.case("a", 0.1, 1.5), "b": clock.case("b", 0.3, 1.5)}, settings)
    assert (seconds["b"] / seconds["a"]).values == pytest.approx((3.0,) * 4)
    assert seconds["a"].values == pytest.approx([0.1 * 1.5**k for k in range(2, 6)])  # two calls to warm up


def test_every_second_round_runs_in_reverse(clock):
    interleave({n: clock.case(n, 0.1) for n in "abc"}, Settings(CPU, 1, rounds=(3, 3), shortest=0.0))
    assert "".join(clock.log) == "aabbcc" + "abc" + "cba" + "abc"


def test_what_is_short_is_repeated_within_a_measurement(clock):
    settings = Settings(CPU, 1, rounds=(2, 2), shortest=1.0)
    seconds = interleave({"short": clock.case("short", 0.3), "long": clock.case("long", 5.0)}, settings)
    assert seconds["short"].values == pytest.approx((0.3, 0.3))
    assert clock.log.count("short") == 2 + 2 * 4 and clock.log.count("long") == 1 + 2


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (5.5, 5), (100.0, 7)])
def test_rounds_go_on_until_the_budget_is_spent_but_keep_their_bounds(clock, budget, rounds):
    settings = Settings(CPU, 1, seconds=budget, rounds=(3, 7), shortest=0.0)
    assert len(interleave({"a": clock.case("a", 1.0)}, settings)["a"].values) == rounds


def test_median_and_quartiles():
    measured = Measured((5.0, 1.0, 2.0, 4.0, 3.0))
    assert measured.median == 3 and measured.quartiles == (2, 4)
    assert measured.map(lambda s: 12 / s).median == 4


def test_only_rounds_of_one_comparison_can_be_divided():
    with pytest.raises(ValueError):
        Measured((1.0, 2.0)) / Measured((1.0,))


def test_tables_keep_plain_values_and_show_the_spread():
    table = Table("Speed", ("case", "images/s", "of dense"), notes=["Goal: 2."])
    table.add(case="dense", **{"images/s": Measured((100.0,))})
    table.add(case="slim|8", of_dense=Measured((4.0, 1.0, 2.0, 3.0, 5.0)), **{"images/s": 1234.5})
    plain = json.loads(json.dumps(table.to_json()))
    assert plain["rows"][1]["of dense"] == {"median": 3.0, "quartiles": [2.0, 4.0], "rounds": 5}
    text, markdown = render_text(plain), render_markdown(plain)
    assert "3.00 (2.00..4.00)" in text and "1,234" in text and "Goal: 2." in text
    assert "| dense | 100 |  |" in markdown and "slim\\|8" in markdown
    assert len({len(line) for line in text.splitlines()[2:4]}) == 1, "the rule is as wide as the header"
    with pytest.raises(KeyError, match="no column"):
        table.add(case="x", speed=1.0)


def section(value: float) -> dict:
    table = Table("T", ("v",))
    table.add(v=value)
    facts = {"device": "chip", "cpu_capability": "x", "threads": 1, "python": "3", "versions": {}, "commit": "c",
             "load_before": "0.00"}  # fmt: skip
    return {"measured": "now", "seconds": 1.0, "quick": False, "environment": facts, "tables": [table.to_json()]}


def test_a_section_measured_again_replaces_itself_and_nothing_else(tmp_path):
    first, second, *_ = SECTIONS
    BenchFile(tmp_path, "chip").put(second, section(2.0))
    BenchFile(tmp_path, "chip").put(first, section(1.0))
    BenchFile(tmp_path, "chip").put(second, section(3.0))
    found = BenchFile(tmp_path, "chip").sections
    assert list(found) == [first, second]
    assert [found[name]["tables"][0]["rows"] for name in found] == [[{"v": 1.0}], [{"v": 3.0}]]
    markdown = (tmp_path / "chip.md").read_text()
    assert (
        markdown.index(f"## {first}") < markdown.index(f"## {second}") and "3.00" in markdown and "2.00" not in markdown
    )


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = BenchFile(tmp_path, "chip")
    file.put("fusion", section(1.0))
    before = (tmp_path / "chip.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ApbmError, match="chip.json"):
        file.put("fusion", section(2.0))
    assert (tmp_path / "chip.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chip.json", "chip.md"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99, "sections": {}}', '{"format": 1}'])
def test_a_damaged_file_is_refused_and_kept(tmp_path, content):
    (tmp_path / "chip.json").write_text(content)
    with pytest.raises(RecordError, match="chip.json"):
        BenchFile(tmp_path, "chip")
    assert (tmp_path / "chip.json").read_text() == content


def test_quick_runs_and_other_numbers_of_threads_or_instructions_have_files_of_their_own(monkeypatch):
    capabilities = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    names = {
        file_name(Settings(CPU, 2), "AMD EPYC(tm) 9"),
        file_name(Settings(CPU, 4), "AMD EPYC(tm) 9"),
        file_name(Settings.rough(CPU, 2), "AMD EPYC(tm) 9"),
    }
    assert names == {"amd-epyc-tm-9-2-threads", "amd-epyc-tm-9-4-threads", "amd-epyc-tm-9-2-threads-quick"}
    capabilities |= {"amx_bf16": True, "avx512_bf16": True}
    assert file_name(Settings(CPU, 2), "Intel Xeon") == "intel-xeon-amx-bf16-2-threads"
    assert file_name(Settings(torch.device("cuda"), 2), "NVIDIA H100") == "nvidia-h100"


def test_sections_are_printed_and_kept_as_they_end(tmp_path, monkeypatch, capsys):
    def one(settings):
        table = Table("First", ("v",))
        table.add(v=1.5)
        return [table]

    def broken(settings):
        raise ApbmError("no such luck")

    monkeypatch.setitem(SECTIONS, "training", one)
    monkeypatch.setitem(SECTIONS, "fusion", broken)
    monkeypatch.setattr(command.Settings, "rough", classmethod(lambda cls, device, threads, **others: TINY))
    status = main(["--quick", "--only", "training", "--only", "fusion", "--results", str(tmp_path)])
    captured = capsys.readouterr()
    assert status == 1 and "no such luck" in captured.err and "First" in captured.out and command.QUICK in captured.out
    (path,) = tmp_path.glob("*.json")
    kept = json.loads(path.read_text())["sections"]
    assert list(kept) == ["training"] and kept["training"]["tables"][0]["rows"] == [{"v": 1.5}]
    assert command.QUICK in kept["training"]["tables"][0]["notes"]
    assert {"device", "threads", "torch", "commit", "versions"} <= kept["training"]["environment"].keys()


def test_bad_arguments_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--only", "nonsense"])
    assert main(["--threads", "0", "--results", str(tmp_path)]) == 1
    assert main(["--device", "abacus", "--results", str(tmp_path)]) == 1
    assert "abacus" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_is_the_training_loops(channels_last):
    recipe = recipe_for(8, precision="float32", channels_last=channels_last)
    split = random_split(24)
    torch.manual_seed(3)
    trained = build_model("resnet20", 10)
    stepped = copy.deepcopy(trained)
    train(trained, split, recipe, 2, seed=5)
    step = TrainingStep(stepped, split, recipe, CPU, seed=5)
    for _ in range(6):
        step()
    for (name, value), other in zip(trained.state_dict().items(), stepped.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_step_lowers_what_the_training_loop_lowers(monkeypatch):
    monkeypatch.setattr(lowering, "FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(lowering, "time_convolution", lambda shape: lowering.ConvTimes(convolution=2.0, products=1.0))
    monkeypatch.setattr(lowering, "LARGEST_SIDE", 8)
    recipe, split = recipe_for(8, precision="float32"), random_split(16)
    trained = network("resnet20", "dense")
    stepped = copy.deepcopy(trained)
    result = train(trained, split, recipe, 1, seed=5)
    step = TrainingStep(stepped, split, recipe, CPU, seed=5)
    step(), step()
    assert step.lowered == result.lowered and len(step.lowered) == 5
    states = zip(trained.state_dict().values(), stepped.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in states)
    assert not any("_conv_forward" in vars(module) for module in stepped.modules())


@pytest.mark.parametrize(
    ("at_least", "limit", "expected"),
    [
        (False, 2.0, "Goal: x: at most 2. Met: 2."),
        (False, 1.9, "Goal: x: at most 1.9. Missed: 2. Because."),
        (True, 2.0, "Goal: x: at least 2. Met: 2."),
        (True, 2.5, "Goal: x: at least 2.5. Missed: 2. Because."),
    ],
)
def test_a_missed_goal_is_explained(at_least, limit, expected):
    assert goal("x", Measured((1.0, 2.0, 9.0)), limit, at_least=at_least, otherwise="Because.") == expected


def test_the_literal_loop_gives_the_importance_it_is_timed_for():
    weight = torch.randn(12, 3, 3, 3)
    expected = relative_entropy(log_similarity(pairwise_distances(weight), 1.0))
    torch.testing.assert_close(literal_importance(weight), expected)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["aten::mm", "bench::fusion"], "fusion"),
        (["aten::copy_", "aten::convolution_backward", "ConvolutionBackward0"], "conv backward"),
        (["aten::add_", "aten::_foreach_add_", "Optimizer.step#SGD.step"], "optimizer"),
        (["aten::add"], "shortcuts"),
        (["aten::mm", "aten::addmm_", "ProductConvolution"], "conv forward"),
        (["aten::mm", "aten::matmul", "ProductConvolutionBackward"], "conv backward"),
        (["aten::mm", "AddmmBackward0"], "linear and loss"),
        (["aten::mm", "MmBackward0"], "fusion"),
        (["aten::native_batch_norm", "aten::batch_norm"], "BatchNorm"),
        (["aten::copy_", "aten::_to_copy", "aten::to"], "casts and copies"),
        (["aten::nothing_we_know"], "other"),
    ],
)
def test_an_operation_belongs_to_its_outermost_known_caller(names, kind):
    event = None
    for name in reversed(names):
        event = SimpleNamespace(name=name, cpu_parent=event)
    assert kind_of(event) == kind


def test_a_profile_tells_a_fused_network_from_a_plain_one():
    plain = build_model("resnet20", 10)
    fused = fuse(plain, torch.zeros(1, 3, 32, 32), 0.5)
    of_plain, of_fused = (profile_step(fastest_step(model, TINY), TINY) for model in (plain, fused))
    for shares in (of_plain, of_fused):
        assert set(shares) == set(KINDS) and sum(shares.values()) == pytest.approx(1)
        for kind in ("conv forward", "conv weight gradient", "conv input gradient", "BatchNorm", "optimizer", "input"):
            assert shares[kind] > 0, kind
        assert shares["other"] < 0.2
    assert of_plain["fusion"] == 0 < of_fused["fusion"]


def test_slim_networks_take_the_multiples_they_are_named_for():
    widths = [m.out_channels for m in network("vgg16", "slim/8").modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)


EXPECTED_ROWS = {"training": 14, "fusion": 12, "rescoring": 4, "criteria": 8, "input": 2, "profile": len(KINDS)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=pytest.mark.slow if n in ("criteria", "fusion", "profile", "rescoring", "training") else ()
        )
        for n in EXPECTED_ROWS
    ],
)
def test_a_section_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("APBM_DATA", str(tmp_path))  # no CIFAR there: the digits
    tables = [table.to_json() for table in SECTIONS[name](TINY)]
    assert len(tables[0]["rows"]) >= EXPECTED_ROWS[name]
    for table in tables:
        assert table["rows"] and render_text(table) and render_markdown(table)
        json.dumps(table, allow_nan=False)


@pytest.mark.slow
def test_deployment_compares_each_network_with_its_dense_self():
    speed, rounding = deployment(TINY, {"resnet56": ("dense", "slim")})
    runtimes = [row["runtime"] for row in speed.rows]
    assert runtimes[:2] == ["eager", "eager"]
    for runtime in set(runtimes):
        dense, slim = (row for row in speed.rows if row["runtime"] == runtime)
        promised, gain = slim["MACs, dense / this"], slim["images/s, this / dense"]
        assert dense["MACs, dense / this"] == 1 < promised
        assert gain.values == pytest.approx((slim["images/s"] / dense["images/s"]).values)
        assert slim["realised %"].median == pytest.approx(100 * gain.median / promised)
    assert rounding.rows[1]["removed %"] == pytest.approx(48.84, abs=0.1)


@pytest.mark.slow
def test_two_processes_take_turns_with_one():
    (table,) = SECTIONS["side-by-side"](Settings(CPU, threads=2, batch_size=2, seconds=0.0, rounds=(1, 1)))
    one, two = table.rows
    assert one["of one"].values == (1.0,)
    assert two["of one"].values == pytest.approx((two["images/s"] / one["images/s"]).values)
    (table,) = SECTIONS["side-by-side"](Settings(CPU, threads=1))
    assert not table.rows and "Not measured" in table.notes[0]


def test_no_path_of_this_machine_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(SECTIONS, "training", lambda settings: [Table("T", ("v",), rows=[{"v": 1.0}])])
    run_sections(["training"], TINY, tmp_path)
    for path in tmp_path.iterdir():
        assert str(tmp_path) not in path.read_text() and os.path.expanduser("~") not in path.read_text()
