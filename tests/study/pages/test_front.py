"""The front page: every number in it is a record's, and it needs nothing but itself."""

import itertools
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from fake_records import fake_record

from apbm_core import similarity
from apbm_core.errors import ConfigError
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.run import execute
from apbm_core.study.networks.models import build_model
from apbm_core.study.pages import drawings, explorer, findings, front
from apbm_core.study.records import read_record

RESULTS = Path(__file__).parents[3] / "results"
PATHS = sorted(path for path in RESULTS.glob("*/runs/*.json") if path.parts[-3] != "own")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return front.page(RESULTS)


def embedded(said: str) -> list[dict]:
    data = json.loads(re.search(r'<script type="application/json" id="runs">(.*?)</script>', said, re.DOTALL)[1])
    words, rows = data["words"], [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    rows = [{name: words[name][cell] if name in words else cell for name, cell in row.items()} for row in rows]
    return [row | {"record": f"{row['profile']}/runs/{row['id']}.json"} for row in rows]


def test_every_record_is_a_row_with_the_records_numbers(said):
    rows = {row["record"]: row for row in embedded(said)}
    assert set(rows) == {path.relative_to(RESULTS).as_posix() for path in PATHS}
    for path in PATHS:
        record, row = read_record(path), rows[path.relative_to(RESULTS).as_posix()]
        accuracy = record.val_accuracy if record.test_accuracy is None else record.test_accuracy
        assert row["accuracy"] == pytest.approx(100 * accuracy, abs=6e-4)
        assert row["minutes"] == pytest.approx(record.seconds / 60, abs=6e-4)
        assert row["removed"] == pytest.approx(100 * record.parameters_removed, abs=6e-4)
        assert row["macs"] == pytest.approx(100 * record.macs_removed, abs=6e-4)
        assert (row["machine"], row["seed"], row["id"]) == (record.timed_on, record.config.seed, record.id)
        assert len(row["course"]["train_accuracy"]) == len(record.history)


def test_it_asks_nothing_of_a_network(said):
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)(?:https?:|//)""", said)
    assert (
        "@import" not in said and "import(" not in said and "fetch(" not in said and "$" not in said.split("<script")[0]
    )
    assert len(said) < 250_000
    for name in re.findall(r'href="#([^"]+)"', said):
        assert f'id="{name}"' in said


def test_the_findings_are_readable_without_scripts_and_are_the_records(said):
    before_scripts = re.sub(r"<script.*?</script>", "", said, flags=re.DOTALL)
    by_id = {path.stem: read_record(path) for path in PATHS if path.parts[-3] == "cpu"}
    records = front.read_all(RESULTS)
    assert findings.headline(records) == "cpu" and findings.curves(records) == "curves"
    for method in ("apbm", "scratch", "swp"):
        (record,) = [
            r for r in by_id.values()
            if r.config.model == "resnet56" and r.config.method == method and r.config.schedule == "equal"
        ]  # fmt: skip
        assert f"{100 * record.test_accuracy:.2f} %" in before_scripts
    levels = {
        (r.config.method, r.config.target, r.config.seed): 100 * r.test_accuracy
        for r in records["curves"]
        if (r.config.model, r.config.dataset, r.config.widths) == ("vgg16", "cifar10", "uniform")
    }
    for rival, words in (("scratch", "slim from scratch"), ("swp", "SWP"), ("polarization", "Polarization")):
        targets = {target for method, target, _ in levels if method == rival}
        seeds = {seed for method, _, seed in levels if method == rival}
        whole = {
            these: [seed for seed in seeds if all((rival, target, seed) in levels for target in these)]
            for count in range(2, len(targets) + 1)
            for these in itertools.combinations(sorted(targets), count)
        }
        enough = [these for these, there in whole.items() if len(there) >= 3] or [tuple(sorted(targets))]
        most = [these for these in enough if len(these) == max(map(len, enough))]
        pairs = [(these, seed) for these in most for seed in whole[these]]
        mean = np.mean([levels["apbm", t, seed] - levels[rival, t, seed] for these, seed in pairs for t in these])
        assert re.search(rf"{words} {re.escape(f'{mean:+.2f}')}( ± [\d.]+)? \({len(most[0])} targets, ", before_scripts)
    assert before_scripts.count("<svg") >= 2 and 'role="img"' in before_scripts


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (("above", "inconclusive"), "Passing the input on helps; fusing has not been shown to help beside it."),
        (("below", "above"), "Passing the input on hurts; fusing helps beside it."),
    ],
)
def test_what_is_said_of_passing_follows_the_verdicts(verdicts, words):
    pairs = pd.DataFrame(
        {
            "with": ["passing-fused", "passing-fused"],
            "without": ["scratch", "passing"],
            "difference": [2.5, -0.125],
            "interval of difference": [1.0, 0.5],
            "pairs": [4, 4],
            "verdict": verdicts,
        }
    )
    (said,) = findings.sentences({}, pd.DataFrame(), pairs)
    assert words in said and "+2.50 ± 1.00" in said and "-0.12 ± 0.50" in said and "4 seeds" in said


@pytest.mark.parametrize("narrow", [False, True])
def test_a_curve_is_said_and_drawn_with_the_records_numbers(narrow):
    levels = {
        "dense": (0.9, 0.9, 0.9),
        "apbm": (0.88, 0.85, 0.8),
        "scratch": (0.87, 0.85, 0.76),
        "swp": (0.89, 0.8, 0.8),
    }
    runs = [
        fake_record(method, level, target=0.0 if method == "dense" else target, model="vgg16")
        for method, each in levels.items()
        for target, level in zip((0.5, 0.75, 0.9274), each, strict=True)
        if method != "dense" or target == 0.5
    ]
    records = {"two": runs[:2], "curves": runs}
    assert findings.curves(records) == "curves" and findings.curves({"two": runs[:3]}) == ""
    (said,) = findings.sentences(records, pd.DataFrame())
    assert "VGG16 on CIFAR-10, 50 to 92.74 % of its parameters removed" in said
    assert "slim from scratch +1.67 (3 targets, 1 seed, +0.00 to +4.00)" in said
    assert "SWP +1.33 (3 targets, 1 seed, -1.00 to +5.00)." in said
    ((bed, table),) = findings.curve_points(runs)
    picture, words = drawings.curve(table, *bed, narrow)
    tree = ElementTree.fromstring(picture)
    lines = [[float(p.split(",")[1]) for p in e.get("points").split()] for e in tree.iter() if "points" in e.attrib]
    assert len(lines) == 3 and all(len(line) == 3 for line in lines)
    drawn = sorted(y for line in lines for y in line)  # downwards: the lowest height is the highest accuracy
    asked = sorted((level for method, each in levels.items() if method != "dense" for level in each), reverse=True)
    slope = (drawn[-1] - drawn[0]) / (asked[-1] - asked[0])
    assert drawn == pytest.approx([drawn[0] + slope * (level - asked[0]) for level in asked], abs=0.11)
    assert "APBM is highest on average, 84.33 %" in words
    names = [e.text for e in tree.iter() if e.text in ("APBM", "SWP", "slim from scratch", "dense")]
    assert sorted(names) == ["APBM", "SWP", "dense", "slim from scratch"]


def test_a_curve_is_said_of_all_pairs_of_a_seed_and_of_what_stands_the_correction():
    """More seeds of APBM and slim from scratch than of a rival: each difference is of the pairs that there are."""
    generator = np.random.default_rng(0)
    keys = itertools.product(("apbm", "scratch"), (0.5, 0.75, 0.9), range(3))
    noise = {key: generator.normal(0, 0.001) for key in keys}
    runs = [
        fake_record(method, (0.9 if method == "apbm" else 0.87) - 0.1 * seed + noise[method, target, seed], seed,
                    target=target, model="vgg16")
        for method, target, seed in noise
    ]  # fmt: skip
    runs += [fake_record("swp", 0.5, 0, target=0.9, model="vgg16")]
    (said,) = findings.sentences({"curves": runs}, pd.DataFrame())
    mean = 3 + 100 * np.mean([v if m == "apbm" else -v for (m, _, _), v in noise.items()]) * 2
    assert f"slim from scratch {mean:+.2f} ± " in said and "(3 targets, 3 seeds, above)" in said
    assert re.search(r"SWP \+\d+\.\d\d \(1 target, 1 seed\)", said)


def test_a_second_data_set_with_one_target_is_said_once_it_has_seeds_for_a_verdict():
    def said(seeds):
        curve = [fake_record(m, 0.8, target=t, model="vgg16") for m in ("apbm", "scratch") for t in (0.5, 0.75, 0.9)]
        other = [
            fake_record(m, level + 0.001 * seed**2, seed, target=0.97, model="vgg16", dataset="cifar100")
            for m, level in (("apbm", 0.42), ("scratch", 0.28))
            for seed in range(seeds)
        ]
        return findings.sentences({"curves": curve + other}, pd.DataFrame())

    assert "ahead of" not in said(2)[1]
    found = said(3)[1]
    assert (
        "VGG16 on CIFAR-100, 97 % of its parameters removed" in found and "ahead of slim from scratch +14.00" in found
    )


def test_a_folder_without_records_has_a_page_all_the_same(tmp_path):
    assert "no record here yet" in front.write(tmp_path).read_text()
    assert findings.headline({}) == ""


def test_distances_and_lengths_survive_the_packing():
    import base64

    weight = torch.randn(7, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    data = explorer.layer_data(weight)
    triangle = np.frombuffer(base64.b64decode(data["triangle"]), "<f4")
    rows, columns = torch.triu_indices(7, 7, 1)
    assert triangle == pytest.approx(similarity.pairwise_distances(weight)[rows, columns].numpy(), rel=1e-6)
    assert data["l1"] == pytest.approx(weight.abs().flatten(1).sum(1).tolist(), rel=1e-5)


def test_what_cannot_be_explored_is_refused():
    network = build_model("resnet20", 10)
    with pytest.raises(ConfigError, match="there is no layer 'layer9'"):
        explorer.network_layers({"now": network}, ["layer9"])
    with pytest.raises(ConfigError, match="has 128 filters; at most 64"):
        explorer.network_layers({"now": torch.nn.Sequential(torch.nn.Conv2d(3, 128, 3))}, ["0"])
    with pytest.raises(ConfigError, match="no layer to explore"):
        explorer.network_layers({"now": network}, [])


def test_the_initial_network_is_the_one_that_the_run_started_from(tmp_path):
    """With steps too small to count, the stored network and the one drawn again are the same."""
    values = {"dataset": "digits", "models": ["resnet20"], "methods": ["dense"], "epochs": 1, "train_subset": 64,
              "test_subset": 10, "recipe_overrides": {"lr": 1e-30, "weight_decay": 0.0}, "device": "cpu"}  # fmt: skip
    study = Study.of(tmp_path, **values)
    (config,) = study.configs()
    record = execute(config, str(tmp_path), "cpu", 1)
    moments = explorer.recorded_moments(record, tmp_path)
    for before, after in zip(moments["at initialisation"].parameters(), moments["trained"].parameters(), strict=True):
        assert torch.allclose(before, after, rtol=1e-6, atol=1e-20)
    name, mine, words = explorer.example_network(study)
    assert name == "resnet20"
    assert all(map(torch.equal, mine["trained"].parameters(), moments["trained"].parameters()))
    assert record.id in words
    (tmp_path / "networks" / record.network).unlink()
    assert explorer.recorded_moments(record, tmp_path) is None
    _, published, words = explorer.example_network(study)
    assert published["trained"].state_dict().keys() == mine["trained"].state_dict().keys()
    assert "trained/runs/resnet20-dense" in words, "where the study kept none, the published one is shown"


def test_a_study_without_a_trained_network_shows_the_published_one_of_another(tmp_path):
    study = Study.of(tmp_path, dataset="digits", models=["vgg16"], targets={"vgg16": [0.9]}, device="cpu")
    name, moments, words = explorer.example_network(study)
    assert name == "resnet20" and list(moments) == ["at initialisation", "trained"]
    assert words.startswith("ResNet20, ") and "of CIFAR-10 after" in words


def test_where_no_trained_network_is_kept_one_is_trained_for_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "repository", lambda: tmp_path)
    study = Study.of(tmp_path / "own", dataset="digits", models=["resnet20"], method_images=128, device="cpu")
    name, moments, words = explorer.example_network(study)
    assert name == "resnet20" and list(moments) == ["at initialisation", "after 128 images"]
    assert words.startswith("No trained ResNet20 is kept here: this one saw 128 images once")
    before, after = (dict(network.named_parameters()) for network in moments.values())
    assert not torch.equal(before["conv1.weight"], after["conv1.weight"])


def test_what_fusing_once_leaves_is_said_beside_the_same_cut():
    def cut(method, before, after, seed):
        record = fake_record(method, after, seed=seed, target=0.75)
        return record.model_copy(update={"notes": {"after_cut": {"val_accuracy": before}}})

    runs = [cut("fused_once", 0.61, 0.8, 0), cut("fused_once", 0.63, 0.82, 1), cut("entropy_cut", 0.5, 0.79, 0),
            cut("entropy_cut", 0.5, 0.79, 1), cut("l1", 0.4, 0.7, 0), cut("l1", 0.4, 0.7, 1)]  # fmt: skip
    (said,) = findings._of_trained({"mine": runs, "other": [fake_record("l1", 0.8, target=0.75)]})
    assert (
        "2 seeds), % accuracy with 75&nbsp;% removed, right after: APBM, fused once 62.00; relative entropy, cut"
        in said
    )
    assert said.endswith("cut 50.00; fine-tuned: APBM, fused once 81.00; relative entropy, cut 79.00.")
    chosen = [cut("fused_by_responses", 0.7, 0.83, seed) for seed in range(2)]
    assert (
        "right after: APBM, fused once by responses 70.00; APBM, fused once 62.00"
        in findings._of_trained({"mine": runs + chosen})[0]
    )
    assert findings._of_trained({"mine": runs[2:]}) == []
