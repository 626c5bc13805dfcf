"""Deployment: every format gives the same answers for every batch size, and measuring measures what it says."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_records import fake_record
from torch import nn

import apbm_core
from apbm_core.counting import count_parameters
from apbm_core.errors import CheckpointError, ConfigError, UnsupportedNetwork
from apbm_core.study.networks.models import build_model, dense_widths
from apbm_core.study.networks.storage import save_compact, widths_of
from apbm_core.study.records import ResultsFolder
from apbm_core.study.report import deployment

EXAMPLE = torch.zeros(1, 3, 32, 32)
WIDTHS = [count // 2 for count in dense_widths("resnet20")]
ANY = deployment.Latency(1.0, 1.0, 2, 1, 1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A ResNet20 of half the widths with moving statistics of its own, in every format."""
    torch.manual_seed(0)
    model = build_model("resnet20", 7, WIDTHS).train()
    with torch.no_grad():
        model(torch.randn(16, 3, 32, 32))
    folder = tmp_path_factory.mktemp("deploy")
    return model, deployment.write_all(folder, "net", model, EXAMPLE, "resnet20", 7)


def test_every_format_is_written(written):
    model, files = written
    expected = [".safetensors", ".pt2"] if deployment.why_no_onnx() else [".safetensors", ".onnx", ".pt2"]
    assert [path.suffix for path in files] == expected
    assert model.training  # left as it was
    assert all(path.stat().st_size > 4 * count_parameters(model) for path in files)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_all_formats_agree_with_the_network_at_every_batch_size(written, batch):
    model, files = written
    images = torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        wanted = build_like(model)(images)
        for path in files:
            torch.testing.assert_close(deployment.open_file(path)(images), wanted, rtol=1e-4, atol=1e-4)


def build_like(model: nn.Module) -> nn.Module:
    twin = build_model("resnet20", 7, WIDTHS)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def test_one_row_a_file_with_its_size_and_its_agreement(written):
    model, files = written
    rows = deployment.measure_files(files, build_like(model), torch.randn(70, 3, 32, 32), n=2)
    assert [row["kB"] for row in rows] == [path.stat().st_size / 1000 for path in files]
    assert all(row["difference of logits"] < 1e-5 and row["same class"] == 100 for row in rows)
    assert all(0 < row["ms for 1"] <= row["p95 for 1"] and row["ms for 64"] > 0 for row in rows)


def test_agreement_against_numbers_worked_out_by_hand():
    images = torch.zeros(2, 3, 4, 4)
    a = torch.tensor([[1.0, -4.0], [2.0, 3.0]])
    b = torch.tensor([[1.0, -4.0], [3.5, 3.0]])
    found = deployment.agreement(lambda _: a, lambda _: b, images)
    assert found == deployment.Agreement(difference=1.5 / 4, same_class=0.5)
    for other in (torch.zeros(2, 3), torch.full((2, 2), float("nan")), torch.zeros(2)):
        with pytest.raises(ConfigError, match="cannot be compared"):
            deployment.agreement(lambda _: a, lambda _, other=other: other, images)


def test_latency_is_the_median_and_the_95th_percentile_of_the_calls_that_count(monkeypatch):
    times = [50.0, 40.0, *(float(t) for t in np.random.default_rng(0).permutation(np.arange(1, 31)))]
    clock, seen = [0.0], []
    monkeypatch.setattr(deployment.time, "perf_counter", lambda: clock[0])

    def call(images):
        seen.append((len(images), torch.get_num_threads()))
        clock[0] += times[len(seen) - 1]

    before = torch.get_num_threads()
    found = deployment.measure_latency(call, torch.zeros(5, 3), threads=2, n=30, warmup=2)
    assert found.median == pytest.approx(1000 * np.median(times[2:]))
    assert found.p95 == pytest.approx(1000 * np.percentile(times[2:], 95))
    assert (found.n, found.threads, found.batch) == (30, 2, 5)
    assert seen == [(5, 2)] * 32 and torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", [{"n": 1}, {"threads": 0}, {"warmup": -1}])
def test_impossible_measurements_are_refused(wrong):
    with pytest.raises(ConfigError, match="cannot time"):
        deployment.measure_latency(lambda images: images, EXAMPLE, **wrong)


def test_a_network_that_is_fused_still_is_refused(tmp_path):
    fused = apbm_core.fuse(build_model("resnet20"), EXAMPLE)
    with pytest.raises(ConfigError, match="compact"):
        deployment.write_all(tmp_path, "net", fused, EXAMPLE, "resnet20", 10)
    assert not any(tmp_path.iterdir())


def test_files_that_are_missing_damaged_or_unknown_are_refused(written, tmp_path):
    with pytest.raises(ConfigError, match="none of the endings .onnx, .pt2, .safetensors"):
        deployment.open_file(tmp_path / "net.pth")
    for path in written[1]:
        with pytest.raises(CheckpointError, match="nowhere"):
            deployment.open_file(path.with_stem("nowhere"))
        damaged = tmp_path / path.name
        damaged.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(CheckpointError, match="restore it|write it again|make it again"):
            deployment.open_file(damaged)


def test_without_the_onnx_packages_the_other_formats_are_written(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)  # as if it were not installed
    model = build_model("resnet20", 10, WIDTHS)
    files = deployment.write_all(tmp_path, "net", model, EXAMPLE, "resnet20", 10)
    assert [path.suffix for path in files] == [".safetensors", ".pt2"]
    with pytest.raises(ConfigError, match="ONNX is left out"):
        deployment.open_file("a.onnx")


@pytest.mark.parametrize("classes", [7, 10, 100])
@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_a_recorded_network_is_read_or_stands_in_with_its_shapes(name, classes, tmp_path):
    results = ResultsFolder(tmp_path)
    model = build_model(name, classes, [count - 3 for count in dense_widths(name)]).eval()
    record = SimpleNamespace(
        config=SimpleNamespace(model=name, dataset="cifar100" if classes == 100 else "digits"),
        widths=widths_of(model),
        parameters=count_parameters(model),
        num_classes=classes if classes == 7 else None,  # the first records do not say
        id="some-run",
        network="some-run.safetensors",
    )
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    stand_in, found, words = deployment.recorded_network(results, record)
    assert found == classes and "random weights" in words
    assert {key: value.shape for key, value in stand_in.state_dict().items()} == shapes
    save_compact(results.networks / record.network, model, name, classes)
    stored, found, words = deployment.recorded_network(results, record)
    assert (found, words) == (classes, "")
    assert all(torch.equal(value, stored.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_network_that_is_kept_stands_in_for_the_same_run_only_and_says_if_it_is_another_machines(tmp_path):
    """Equal configurations give other weights on other processors: the file must be the one of some record of them."""
    model = build_model("resnet20").eval()
    kept = save_compact(tmp_path / "trained" / "networks" / "some-run.safetensors", model, "resnet20", 10)
    record = SimpleNamespace(
        config=SimpleNamespace(model="resnet20", dataset="digits"),
        widths=widths_of(model),
        parameters=count_parameters(model),
        num_classes=10,
        id="some-run",
        network="some-run.safetensors",
        network_sha256=hashlib.sha256(kept.read_bytes()).hexdigest(),
    )
    results = ResultsFolder(tmp_path / "quick")
    found, _, words = deployment.recorded_network(results, record)
    assert not words and torch.equal(next(found.parameters()), next(model.parameters()))
    digest, record.network_sha256 = record.network_sha256, "another"
    assert "random weights" in deployment.recorded_network(results, record)[2]
    elsewhere = fake_record("dense", 0.7125).model_copy(update={"network_sha256": digest})
    record.id = elsewhere.id
    assert ResultsFolder(tmp_path / "trained").write(elsewhere).name == f"{record.id}.json"
    found, _, words = deployment.recorded_network(results, record)
    assert "another machine" in words and "71.25 %" in words
    assert torch.equal(next(found.parameters()), next(model.parameters()))


def test_stripes_cannot_be_told_from_widths(tmp_path):
    model = build_model("resnet20")
    record = SimpleNamespace(
        config=SimpleNamespace(model="resnet20", dataset="digits"),
        num_classes=10,
        widths=widths_of(model),
        parameters=count_parameters(model) - 1,
        id="some-run",
        network="some-run.safetensors",
    )
    with pytest.raises(UnsupportedNetwork, match="run it again"):
        deployment.recorded_network(ResultsFolder(tmp_path), record)


def test_few_images_are_repeated_for_a_batch(written, monkeypatch):
    timed = []
    monkeypatch.setattr(
        deployment, "measure_latency", lambda call, images, threads, n: timed.append((len(images), n)) or ANY
    )
    deployment.measure_files(written[1][:1], build_like(written[0]), torch.randn(9, 3, 32, 32), n=30)
    assert timed == [(1, 30), (64, 6)]
    with pytest.raises(ConfigError, match="no images"):
        deployment.measure_files(written[1], build_like(written[0]), torch.zeros(0, 3, 32, 32))


def test_the_summary_compares_the_smallest_files_and_the_fastest_formats():
    def row(method, kilobytes, one, many, difference):
        return {
            "method": method,
            "kB": kilobytes,
            "ms for 1": one,
            "ms for 64": many,
            "difference of logits": difference,
        }

    rows = [row("dense", 900, 4.0, 90.0, 1e-7), row("dense", 800, 6.0, 60.0, 0.0)]
    assert deployment.summary(rows) == "All formats agree with the network to 1e-07 of its largest logit."
    rows += [row("apbm", 400, 2.0, 50.0, 3e-6), row("apbm", 500, 3.0, 40.0, 0.0)]
    assert deployment.summary(rows) == (
        "Against dense, APBM's smallest file is 2.0 times smaller and its fastest format 2.0 times as fast for one "
        "image, 1.5 times for 64; all formats agree with the network to 3e-06 of its largest logit."
    )
