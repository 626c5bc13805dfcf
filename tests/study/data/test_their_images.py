"""Folders and files as other programs leave them: each read with the right values, and what was done about it said."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from fake_data import encode, make_pixels, write_image_folder, write_parquet_cifar10
from PIL import Image

from apbm_core.errors import DataError
from apbm_core.study.data.image_folder import natural_order
from apbm_core.study.data.images import decode_images
from apbm_core.study.data.layouts import find_layout

ROW = np.array([0, 36, 72, 109, 145, 182, 218, 255], dtype=np.uint8)


def decoded(content: bytes) -> np.ndarray:
    return decode_images([content], None, lambda index: "it", "of one size").numpy()[0]


def test_sixteen_bits_of_grey_are_read_as_the_same_picture_of_eight():
    grey = np.tile(ROW, (8, 1))
    deep = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257).save(deep, "PNG")
    assert np.array_equal(decoded(deep.getvalue()), decoded(encode(grey)))
    assert decoded(deep.getvalue())[0, :, 1].tolist() == ROW.tolist()


@pytest.mark.parametrize("ending", ["webp", "bmp", "tif", "tiff", "ppm"])
def test_every_usual_kind_of_image_is_found_and_read(ending, tmp_path):
    content = write_image_folder(tmp_path)
    formats = {"webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF", "ppm": "PPM"}
    for path in list(tmp_path.rglob("*.png")):
        pixels = np.asarray(Image.open(path))
        path.with_suffix(f".{ending}").write_bytes(encode(pixels, formats[ending]))
        path.unlink()
    found = find_layout("shapes", tmp_path).read()
    wanted = np.concatenate([content["train"][name] for name in ("circle", "square")])
    assert np.array_equal(found.train.images.numpy(), wanted)


def test_hidden_files_are_left_out_and_counted(tmp_path):
    write_image_folder(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "shapes" / split / "circle" / "._000.png").write_bytes(b"resource fork")
    layout = find_layout("shapes", tmp_path)
    assert len(layout.read().train) == 8 and "2 hidden files left out" in layout.description


def test_val_is_taken_where_there_is_no_test_and_said(tmp_path):
    content = write_image_folder(tmp_path)
    (tmp_path / "shapes" / "test").rename(tmp_path / "shapes" / "val")
    layout = find_layout("shapes", tmp_path)
    assert np.array_equal(layout.read().test.images.numpy()[:4], content["test"]["circle"])
    assert "{train,val}" in layout.description


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
    names = tuple(str(number) for number in range(1, 12))
    content = write_image_folder(tmp_path, classes=names, per_class=1)
    layout = find_layout("shapes", tmp_path)
    found = layout.read()
    assert found.classes == names and "order of their numbers" in layout.description
    assert np.array_equal(found.train.images[found.train.labels == 9].numpy()[0], content["train"]["10"][0])
    assert sorted(["b10", "b9", "a", "9", "10"], key=natural_order) == ["9", "10", "a", "b9", "b10"]


@pytest.mark.parametrize("place", ["plain_text", "data", "."])
def test_hugging_faces_own_file_names_and_column(place, tmp_path):
    content = write_parquet_cifar10(tmp_path)
    folder = tmp_path / "cifar10"
    for split in ("train", "test"):
        table = pa.parquet.read_table(folder / f"{split}.parquet").rename_columns(["image", "label"])
        path = folder / place / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        pa.parquet.write_table(table, path)
        (folder / f"{split}.parquet").unlink()
    found = find_layout("cifar10", tmp_path).read()
    assert np.array_equal(found.train.images.numpy(), content["train"][0])
    assert found.test.labels.tolist() == content["test"][1].tolist()
    (folder / place / "train-00001-of-00002.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="several files of the train split"):
        find_layout("cifar10", tmp_path).read()


def test_a_split_in_parts_is_read_whole_and_in_order(tmp_path):
    content = write_parquet_cifar10(tmp_path)
    folder = tmp_path / "cifar10"
    table = pa.parquet.read_table(folder / "train.parquet")
    (folder / "train.parquet").unlink()
    (folder / "data").mkdir()
    parts = [folder / "data" / f"train-{number:05d}-of-00011-0a1b.parquet" for number in range(11)]
    for number, path in enumerate(parts):
        pa.parquet.write_table(table.slice(number, 1 if number < 10 else None), path)
    layout = find_layout("cifar10", tmp_path)
    key, found = layout.key(), layout.read()
    assert np.array_equal(found.train.images.numpy(), content["train"][0])
    assert found.train.labels.tolist() == content["train"][1].tolist()
    pa.parquet.write_table(table.slice(1, 1), parts[4])
    assert layout.key() != key
    parts[7].unlink()
    with pytest.raises(DataError, match="10 of the 11 parts .* train-00007-of-00011.parquet is missing"):
        layout.read()
    pa.parquet.write_table(table, folder / "data" / "train-00007-of-00011-cafe.parquet")
    assert len(layout.read().train) == 2 * len(table) - 1
    pa.parquet.write_table(table, folder / "data" / "train-00007-of-00011.parquet")
    with pytest.raises(DataError, match="several files"):
        layout.read()


def test_an_animation_is_its_first_picture():
    frames = [Image.fromarray(image) for image in make_pixels(2, 0, 8) // 128 * 255]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decoded(file.getvalue()), np.asarray(frames[0]))
