"""Tiny data sets in every layout, for the tests of reading them."""

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torchvision
from PIL import Image

from apbm_core.study.data.named import NAMED


def make_pixels(count, seed, size=32):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def encode(pixels, image_format="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **({"lossless": True} if image_format == "WEBP" else {}))
    return file.getvalue()


def write_parquet(path, pixels, labels, label_column="label", image_format="PNG", encoded=None):
    """One split in the Hugging Face layout; ``encoded`` replaces the encoding of ``pixels``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = encoded or [encode(image, image_format) for image in pixels]
    images = [{"bytes": content, "path": f"{index}.png"} for index, content in enumerate(encoded)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = {"img": pa.array(images, kind), label_column: pa.array(list(labels), pa.int64())}
    # Stored as they are, so that a test can find an image's bytes in the file.
    pa.parquet.write_table(pa.table(table), path, compression="none", use_dictionary=False)


def write_parquet_cifar10(root, train=20, test=10, image_format="PNG"):
    """A CIFAR-10 of ``train`` and ``test`` images; returns {split: (pixels, labels)}."""
    content = {}
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        content[split] = make_pixels(count, seed), np.arange(count) % 10
        write_parquet(Path(root) / "cifar10" / f"{split}.parquet", *content[split], image_format=image_format)
    return content


def write_image_folder(root, name="shapes", classes=("circle", "square"), per_class=4, size=32):
    """Folders of PNGs; returns {split: {class: pixels}}."""
    content = {}
    for seed, split in enumerate(("train", "test")):
        content[split] = {}
        for offset, label in enumerate(classes):
            content[split][label] = make_pixels(per_class, 100 * seed + offset, size)
            folder = Path(root) / name / split / label
            folder.mkdir(parents=True)
            for index, image in enumerate(content[split][label]):
                (folder / f"{index:03d}.png").write_bytes(encode(image))
    return content


def write_torchvision(root, monkeypatch, name="cifar10", per_file=10):
    """Torchvision's pickles, with its MD5 sums replaced by theirs; returns {"train": (pixels, labels), "test": ...}."""
    dataset_class = getattr(torchvision.datasets, NAMED[name].torchvision_class)
    folder = Path(root) / dataset_class.base_folder
    folder.mkdir(parents=True)
    content = {}

    def write(file, value):
        data = pickle.dumps(value)
        (folder / file).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    for split in ("train", "test"):
        pixels, labels, sums = [], [], []
        for number, (file, _) in enumerate(getattr(dataset_class, f"{split}_list")):
            images = make_pixels(per_file, seed=1000 * (split == "test") + number)
            targets = [int(label) for label in np.arange(per_file) % 10]
            planes = images.transpose(0, 3, 1, 2).reshape(per_file, -1)  # stored as three planes, red first
            key = "labels" if name == "cifar10" else "fine_labels"
            sums.append([file, write(file, {"data": planes, key: targets})])
            pixels.append(images)
            labels += targets
        monkeypatch.setattr(dataset_class, f"{split}_list", sums)
        content[split] = np.concatenate(pixels), np.array(labels)
    meta = dict(dataset_class.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: list(NAMED[name].classes)})
    monkeypatch.setattr(dataset_class, "meta", meta)
    return content
