"""Every way the data can be wrong ends in a DataError that names the file and what is the matter."""

import dataclasses
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torchvision
from fake_data import (
    encode,
    make_pixels,
    write_image_folder,
    write_parquet,
    write_parquet_cifar10,
    write_torchvision,
)

from apbm_core.errors import ConfigError, DataError
from apbm_core.study.data.datasets import load_dataset
from apbm_core.study.data.images import Images, channel_statistics, fingerprint
from apbm_core.study.data.named import NAMED

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete")


def refuse(name, root, *fragments):
    """Loading must fail with all ``fragments`` in the message, and must not leave a cache behind."""
    with pytest.raises(DataError) as caught:
        load_dataset(name, root, root / "cache", download=False)
    for fragment in fragments:
        assert str(fragment) in str(caught.value)
    assert not list((root / "cache").glob("*.safetensors"))
    return str(caught.value)


@pytest.fixture
def train(tmp_path):
    """The training file of a sound parquet CIFAR-10 below ``tmp_path``."""
    write_parquet_cifar10(tmp_path)
    return tmp_path / "cifar10" / "train.parquet"


# ---- parquet ----


@pytest.mark.parametrize("kept", [0, 3, 0.3, 0.99])
def test_a_truncated_parquet_file_is_refused(tmp_path, train, kept):
    content = train.read_bytes()
    train.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refuse("cifar10", tmp_path, train, "not a readable Parquet file")


def test_bits_flipped_in_the_footer_are_refused(tmp_path, train):
    content = bytearray(train.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little")
    for offset in range(20):
        content[-8 - footer + offset] ^= 0xFF
    train.write_bytes(content)
    refuse("cifar10", tmp_path, train)


def test_a_bit_flipped_in_an_image_is_refused(tmp_path, train):
    """PNG has checksums, so the decoder notices; the image is named."""
    image = encode(make_pixels(20, 0)[7])
    content = bytearray(train.read_bytes())
    start = content.index(image)
    content[start + len(image) // 2] ^= 1
    train.write_bytes(content)
    refuse("cifar10", tmp_path, f"{train}: image 7 cannot be decoded")


def test_a_flipped_bit_is_found_by_parquets_own_checksums(tmp_path, train):
    table = pa.parquet.read_table(train)
    pa.parquet.write_table(table, train, write_page_checksum=True, use_dictionary=False, compression="none")
    content = bytearray(train.read_bytes())
    label = content.rindex(np.arange(10, dtype=np.int64).tobytes())
    content[label] ^= 1  # still a valid label
    train.write_bytes(content)
    refuse("cifar10", tmp_path, train, "CRC")


@pytest.mark.parametrize("damage", ["pixel", "label"])
def test_a_complete_set_with_other_content_is_not_the_published_one(tmp_path, train, monkeypatch, damage):
    """Lossless WebP has no checksum: a damaged image decodes to something else. The fingerprint finds it."""
    content = write_parquet_cifar10(tmp_path)
    prints = tuple(
        fingerprint(Images(torch.from_numpy(content[split][0]), torch.from_numpy(content[split][1])))
        for split in ("train", "test")
    )
    mean, std = channel_statistics(torch.from_numpy(content["train"][0]))
    tiny = dataclasses.replace(NAMED["cifar10"], counts=(20, 10), fingerprints=prints, mean=mean, std=std)
    monkeypatch.setitem(NAMED, "cifar10", tiny)
    assert len(load_dataset("cifar10", tmp_path, tmp_path / "other cache").train_labels) == 20
    pixels, labels = content["train"]
    if damage == "pixel":
        pixels[11, 5, 5, 0] ^= 1
    else:
        labels[11] ^= 1
    write_parquet(train, pixels, labels)
    refuse("cifar10", tmp_path, train.parent, "the train images have the number but not the content of CIFAR-10's")


def test_the_wrong_columns_are_refused_and_listed(tmp_path, train):
    pa.parquet.write_table(pa.table({"image": [b"x"], "label": [1]}), train)
    refuse("cifar10", tmp_path, train, "image: binary, label: int64", "needs a struct column 'img'")


@pytest.mark.parametrize("column", ["img", "label"])
def test_columns_of_the_wrong_type_are_refused(tmp_path, train, column):
    table = pa.parquet.read_table(train)
    wrong = pa.array(["text"] * table.num_rows)
    pa.parquet.write_table(table.set_column(table.schema.get_field_index(column), column, wrong), train)
    refuse("cifar10", tmp_path, train, f"{column}: string")


def test_a_missing_label_is_refused(tmp_path, train):
    table = pa.parquet.read_table(train)
    pa.parquet.write_table(table.set_column(1, "label", pa.array([None, *range(19)], pa.int64())), train)
    refuse("cifar10", tmp_path, train, "gaps in the column 'label'")


@pytest.mark.parametrize("absent", [None, b""])
def test_missing_image_bytes_are_refused(tmp_path, train, absent):
    encoded = [encode(image) for image in make_pixels(3, 0)]
    write_parquet(train, None, [0, 1, 2], encoded=[encoded[0], encoded[1], absent])
    refuse("cifar10", tmp_path, f"{train}: image 2 has no bytes")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_refused(tmp_path, train, split):
    path = train.with_name(f"{split}.parquet")
    path.unlink()
    refuse("cifar10", tmp_path, path, "is missing")


def test_an_empty_split_is_refused(tmp_path, train):
    pa.parquet.write_table(pa.parquet.read_table(train).slice(0, 0), train)
    refuse("cifar10", tmp_path, train, "holds no image")


def test_an_image_of_another_size_is_refused(tmp_path, train):
    encoded = [encode(image) for image in make_pixels(12, 0)]
    encoded[9] = encode(make_pixels(1, 0, size=31)[0])
    write_parquet(train, None, [0] * 12, encoded=encoded)
    refuse("cifar10", tmp_path, f"{train}: image 9 is 31 x 31 pixels", "CIFAR-10 images are 32 x 32")


@pytest.mark.parametrize("label", [-1, 10, 255])
def test_a_label_out_of_range_is_refused(tmp_path, train, label):
    write_parquet(train, make_pixels(3, 0), [0, label, 2])
    refuse("cifar10", tmp_path, f"{train}: image 1 has the label {label}, outside 0..9")


def test_bytes_that_are_no_image_are_refused(tmp_path, train):
    write_parquet(train, None, [0, 1], encoded=[encode(make_pixels(1, 0)[0]), b"GIF89a, or is it?"])
    refuse("cifar10", tmp_path, f"{train}: image 1 cannot be decoded (not a PNG, JPEG, WEBP,")


def test_a_truncated_image_is_refused(tmp_path, train):
    whole = encode(make_pixels(1, 0)[0])
    write_parquet(train, None, [0, 1], encoded=[whole, whole[:700]])
    refuse("cifar10", tmp_path, f"{train}: image 1 cannot be decoded")


# ---- folders of images ----


def test_class_folders_that_differ_between_train_and_test_are_refused(tmp_path):
    write_image_folder(tmp_path, classes=("circle", "square", "star"))
    (tmp_path / "shapes" / "test" / "star").rename(tmp_path / "shapes" / "test" / "Star")
    refuse("shapes", tmp_path, tmp_path / "shapes", "only in train: star; only in test: Star")


def test_a_class_folder_without_images_is_refused(tmp_path):
    write_image_folder(tmp_path)
    folder = tmp_path / "shapes" / "test" / "square"
    for file in folder.iterdir():
        file.rename(file.with_suffix(".txt"))
    refuse("shapes", tmp_path, folder, "holds no image")


def test_a_split_without_class_folders_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "shapes" / split).mkdir(parents=True)
    refuse("shapes", tmp_path, tmp_path / "shapes" / "train", "no class folders")


def test_a_missing_split_folder_is_refused(tmp_path):
    write_image_folder(tmp_path)
    shutil.rmtree(tmp_path / "shapes" / "test")
    refuse("shapes", tmp_path, tmp_path / "shapes" / "test", "is missing")


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_of_two_sizes_are_refused(tmp_path, split):
    write_image_folder(tmp_path)
    file = tmp_path / "shapes" / split / "square" / "002.png"
    file.write_bytes(encode(make_pixels(1, 0, size=16)[0]))
    refuse("shapes", tmp_path, file, "is 16 x 16 pixels, but all images must be of one size")


def test_a_damaged_image_file_is_refused(tmp_path):
    write_image_folder(tmp_path)
    file = tmp_path / "shapes" / "train" / "square" / "001.png"
    file.write_bytes(file.read_bytes()[:500])
    refuse("shapes", tmp_path, file, "cannot be decoded")


def test_a_dangling_link_is_refused(tmp_path):
    write_image_folder(tmp_path)
    link = tmp_path / "shapes" / "train" / "square" / "zzz.png"
    link.symlink_to(tmp_path / "absent.png")
    refuse("shapes", tmp_path, link, "cannot be read")


def test_cifar10_folders_of_too_few_classes_are_refused(tmp_path):
    write_image_folder(tmp_path, "cifar10")
    refuse("cifar10", tmp_path, tmp_path / "cifar10", "has 2 class folders", "10 classes")


# ---- torchvision's layout, and nothing at all ----


def test_a_damaged_or_missing_torchvision_file_is_named(tmp_path, monkeypatch):
    write_torchvision(tmp_path, monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refuse("cifar10", tmp_path, file, "MD5 differs", "Delete the folder")
    file.unlink()
    refuse("cifar10", tmp_path, file, "is missing")


def test_nothing_there_says_where_it_looked_and_what_to_do(tmp_path):
    refuse("cifar10", tmp_path, tmp_path, "cifar-10-batches-py/", "cifar10/{train,test}.parquet", "APBM_DATA", "digits")
    message = refuse("cifar11", tmp_path, tmp_path, "'cifar11'", "cifar11/{train,test}/<class>/*.png")
    assert "parquet" not in message


def test_without_a_network_the_download_is_named_and_nothing_half_fetched_stays(tmp_path, monkeypatch):
    closed = "http://127.0.0.1:9/cifar-10-python.tar.gz"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", closed)
    with pytest.raises(DataError, match=f"the download of {re.escape(closed)} failed") as caught:
        load_dataset("cifar10", tmp_path / "data", tmp_path / "cache")
    assert "cifar10/{train,test}.parquet" in str(caught.value)
    assert not (tmp_path / "data" / ".cifar10.download").exists()


@pytest.mark.parametrize("name", ["", "../secrets", "a/b", ".hidden", "/etc", None, 10])
def test_a_name_that_is_a_path_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="without a path"):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, 3), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_images_of_the_wrong_type_or_shape_are_refused(images, labels):
    with pytest.raises(DataError, match="must be an? "):
        Images(images, labels)
