"""A named data set is one row: what the rows say, and that a further row is all that a further data set takes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_data import make_pixels, write_image_folder, write_parquet

from apbm_core.errors import ConfigError, DataError
from apbm_core.study.data.datasets import class_count, load_dataset
from apbm_core.study.data.images import Images, channel_statistics, fingerprint
from apbm_core.study.data.layouts import read_digits
from apbm_core.study.data.named import NAMED, NamedDataset, dataset_label, known_side
from apbm_core.study.grid.grid import Study
from apbm_core.study.grid.parameters import StudyParameters

STUDY = {"models": ["resnet20"], "methods": ["apbm"], "targets": {"resnet20": [0.5]}, "device": "cpu"}


def test_the_rows_are_whole():
    assert {name: len(row.classes) for name, row in NAMED.items()} == {"cifar10": 10, "cifar100": 100, "digits": 10}
    for name, row in NAMED.items():
        assert len(set(row.classes)) == len(row.classes) == class_count(name), name
        assert list(row.classes) == sorted(row.classes) and known_side(name) == row.side == 32
    assert [dataset_label(name) for name in ("cifar100", "digits", "mine")] == [
        "CIFAR-100",
        "scikit-learn digits",
        "mine",
    ]
    assert known_side("mine") is None


def test_the_digits_are_those_of_their_row():
    digits = read_digits()
    assert (len(digits.train), len(digits.test)) == NAMED["digits"].counts and digits.classes == NAMED["digits"].classes
    mean, std = channel_statistics(digits.train.images)
    assert mean == pytest.approx(NAMED["digits"].mean, abs=1e-5) and std == pytest.approx(NAMED["digits"].std, abs=1e-5)


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A data set in the Hugging Face layout and the row that makes it known."""
    for seed, (split, count) in enumerate({"train": 40, "test": 20}.items()):
        pixels = make_pixels(count, seed, size=32)
        write_parquet(tmp_path / "shapes" / f"{split}.parquet", pixels, np.arange(count) % 4, label_column="form")
    mean, std = channel_statistics(torch.from_numpy(make_pixels(40, 0, size=32)))
    row = NamedDataset("Shapes", tuple("abcd"), (40, 20), 32, mean, std, label_column="form")
    monkeypatch.setitem(NAMED, "shapes", row)
    monkeypatch.setenv("APBM_DATA", str(tmp_path))
    monkeypatch.setenv("APBM_CACHE", str(tmp_path / "cache"))
    return row


def test_a_further_row_is_a_further_data_set(shapes, monkeypatch):
    dataset = load_dataset("shapes")
    assert dataset.classes == tuple("abcd") and dataset.train_labels.tolist() == [i % 4 for i in range(40)]
    assert dataset_label("shapes") == "Shapes" and class_count("shapes") == 4 and known_side("shapes") == 32
    (config,) = StudyParameters.parse(STUDY | {"dataset": "shapes"}).run_configs("shapes")
    assert config.dataset == "shapes"
    with pytest.raises(DataError, match="Known by name are cifar10, cifar100, digits, shapes; digits needs no files"):
        load_dataset("forms")


@pytest.mark.slow
def test_a_further_row_is_trained_on(shapes, tmp_path):
    (record,) = Study.of(tmp_path / "study", **STUDY, dataset="shapes", epochs=1).run()
    assert record.config.dataset == "shapes" and abs(record.parameters_removed - 0.5) < 0.005
    assert record.dense_parameters == 269_722 - 6 * 65  # ten classes would be 269,722


def test_a_complete_set_of_other_pixels_is_refused(shapes, monkeypatch, tmp_path):
    monkeypatch.setitem(NAMED, "shapes", NamedDataset(**vars(shapes) | {"std": (0.1, 0.2, 0.3)}))
    with pytest.raises(DataError, match=r"standard deviation 0\.2.*Shapes's have 0.10000, 0.20000, 0.30000. They were"):
        load_dataset("shapes")


def test_the_classes_of_a_folder_are_counted_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setenv("APBM_DATA", str(tmp_path))
    write_image_folder(tmp_path, "mine", classes=tuple("abcdefghijklmnopqrst"), per_class=1)
    assert class_count("mine") == 20 and class_count("yours") is None and class_count("../mine") is None
    published = {"models": ["vgg16"], "widths": "apbm-vgg16-cifar10", "methods": ["apbm"], "device": "cpu"}
    ten = StudyParameters.parse(published | {"targets": {"vgg16": [0.9274]}, "dataset": "digits"})
    assert len(ten.run_configs("digits")) == 1
    with pytest.raises(ConfigError, match="with 20 classes"):
        StudyParameters.parse(published | {"targets": {"vgg16": [0.92]}, "dataset": "mine"})
    (tmp_path / "mine" / "test" / "a" / "000.png").unlink()
    (tmp_path / "mine" / "test" / "a").rmdir()
    assert class_count("mine") is None  # whoever loads it is told


def test_a_target_is_checked_with_the_classes_that_there_are(tmp_path, monkeypatch):
    """So many classes that the classifier alone is more than may stay."""
    monkeypatch.setenv("APBM_DATA", str(tmp_path))
    for split in ("train", "test"):
        for number in range(300):
            folder = tmp_path / "many" / split / f"{number:03d}"
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(b"not looked at yet")
    study = STUDY | {"targets": {"resnet20": [0.93]}}
    assert StudyParameters.parse(study | {"dataset": "digits"})
    with pytest.raises(ConfigError, match="Cannot remove 93 %"):
        StudyParameters.parse(study | {"dataset": "many"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_real_data_are_those_of_their_row(name):
    folder = Path(os.environ.get("APBM_DATA", "data")) / name
    if not (folder / "train.parquet").exists():
        pytest.skip(f"{folder} is not here")
    dataset, row = load_dataset(name), NAMED[name]
    assert (len(dataset.train_labels), len(dataset.test_labels)) == row.counts
    assert dataset.mean == pytest.approx(row.mean, abs=5e-6) and dataset.std == pytest.approx(row.std, abs=5e-6)
    assert torch.bincount(dataset.train_labels).tolist() == [row.counts[0] // len(row.classes)] * len(row.classes)
    splits = (dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)
    assert tuple(fingerprint(Images(*split)) for split in splits) == row.fingerprints
