"""The layouts of an image data set on disk, each found by its files and read into memory with every fault named.

`find_layout` takes the first that is there:

1. torchvision's own: ``<root>/cifar-10-batches-py``, ``<root>/cifar-100-python``;
2. Hugging Face's: ``<root>/<name>/{train,test}.parquet``;
3. a folder of images: ``<root>/<name>/{train,test}/<class>/*.png``.

One that is there but damaged is an error, never a reason to try the next.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from apbm_core.errors import DataError
from apbm_core.study.data import cifar
from apbm_core.study.data.images import Images, decode_images, fingerprint, generator_for, stratified_sample
from apbm_core.study.data.named import NAMED, NamedDataset

SPLITS = ("train", "test")
SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".ppm",
    ".pgm",
)  # as torchvision, and GIF
_PART = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")  # a download may put a hash behind the numbers


@dataclass(frozen=True, eq=False)
class Decoded:
    """A data set as a layout yields it: both splits and the class names in the order of the labels."""

    train: Images
    test: Images
    classes: tuple[str, ...]


class Layout(Protocol):
    """One data set in one layout."""

    description: str  # the layout in words, for ``ImageDataset.source``; without the machine's own path
    location: Path  # where it is
    worth_caching: bool  # whether reading means decoding tens of thousands of images
    classes: tuple[str, ...]  # class names in the order of the labels, known before anything is decoded

    def key(self) -> str:
        """A digest that changes when the files change; cheap beside `read`."""

    def read(self) -> Decoded:
        """Read and check everything. Raises DataError, which names the path, for every fault."""


def find_layout(name: str, root: Path) -> Layout | None:
    """The layout in which ``root`` holds ``name``, or ``None`` if it is there in none."""
    if cifar.is_torchvisions(name) and cifar.torchvision_folder(name, root).is_dir():
        return TorchvisionLayout(name, root)
    folder = root / name
    if name in NAMED and any(parquet_files(folder, split) for split in SPLITS):
        return ParquetLayout(folder, NAMED[name])
    if any((folder / split).is_dir() for split in SPLITS):
        return ImageFolderLayout(folder, NAMED.get(name))
    return None


class TorchvisionLayout:
    """CIFAR as torchvision downloads it: pickles with known MD5 sums."""

    worth_caching = False  # nothing is compressed

    def __init__(self, name: str, root: Path) -> None:
        self._name, self._root, self.classes = name, root, NAMED[name].classes
        self.location = cifar.torchvision_folder(name, root)
        self.description = f"{self.location.name} (torchvision's layout, MD5 checked)"

    def key(self) -> str:
        return _digest_of_stats(self.location, sorted(self.location.iterdir()))

    def read(self) -> Decoded:
        return Decoded(*cifar.read_torchvision(self._name, self._root), self.classes)


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder, in their order: ``train.parquet``, or the parts under Hugging Face's own names.

    Raises:
        DataError: parts are missing, or there are several sets of them.
    """
    if (plain := folder / f"{split}.parquet").exists():
        return [plain]
    found = [path for place in ("", "*/") for path in folder.glob(f"{place}{split}-*.parquet")]
    found = sorted((path for path in found if path.name[0] != "."), key=lambda path: path.as_posix())
    parts = [_PART.search(path.name) for path in found]
    if not found or (len(found) == 1 and parts[0] is None):
        return found
    sets = {(path.parent, part[2] if part else None) for path, part in zip(found, parts, strict=True)}
    numbers = [int(part[1]) for part in parts if part]
    if len(sets) > 1 or len(set(numbers)) < len(found):
        names = ", ".join(path.relative_to(folder).as_posix() for path in found)
        raise DataError(
            f"{folder} has several files of the {split} split which are not the parts of one set ({names}); keep "
            f"{split}.parquet, or {split}-00000-of-00002.parquet and so on from one download."
        )
    count = int(parts[0][2])
    if missing := sorted(set(range(count)) - set(numbers)):
        raise DataError(
            f"{found[0].parent} has {len(found)} of the {count} parts of the {split} split: "
            f"{split}-{missing[0]:05d}-of-{count:05d}.parquet is missing. Fetch it."
        )
    return [path for _, path in sorted(zip(numbers, found, strict=True))]


class ParquetLayout:
    """CIFAR as Hugging Face distributes it: encoded images in a struct column, labels in alphabetical order.

    The column is called ``img`` or ``image``, the files ``train.parquet`` or, as in a download,
    ``plain_text/train-00000-of-00001.parquet`` or ``data/train-...``, in one part or several.
    """

    worth_caching = True

    def __init__(self, folder: Path, published: NamedDataset) -> None:
        self.location, self._published, self.classes = folder, published, published.classes
        self.description = f"{folder.name}/train.parquet and test.parquet (Hugging Face layout)"

    def key(self) -> str:
        digest = hashlib.sha256()
        for split in SPLITS:  # few files: their content is read in a blink, and tells of damage that a date does not
            for path in self._paths(split):
                try:
                    with path.open("rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
                except OSError as error:
                    raise DataError(f"{path} cannot be read ({error.strerror}).") from error
        return digest.hexdigest()

    def read(self) -> Decoded:
        train, test = (self._read_split(split) for split in SPLITS)
        return _require_published(Decoded(train, test, self.classes), self._published, self.location)

    def _paths(self, split: str) -> list[Path]:
        paths = parquet_files(self.location, split)
        if not paths or not all(path.is_file() for path in paths):
            missing = next((path for path in paths if not path.is_file()), self.location / f"{split}.parquet")
            raise DataError(f"{missing} is missing: both train.parquet and test.parquet are needed. Fetch it.")
        return paths

    def _read_split(self, split: str) -> Images:
        parts = [self._read_part(path) for path in self._paths(split)]
        if len(parts) == 1:
            return parts[0]
        return Images(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))

    def _read_part(self, path: Path) -> Images:
        encoded, labels = self._read_columns(path)
        if not encoded:
            raise DataError(f"{path} holds no image; fetch it again.")
        for index, content in enumerate(encoded):
            if not content:
                raise DataError(f"{path}: image {index} has no bytes. Fetch the file again.")
        _require_labels(labels, len(self._published.classes), path)
        pixels = decode_images(
            encoded, self._published.size, lambda index: f"{path}: image {index}", _expected_size(self._published)
        )
        return Images(pixels, torch.from_numpy(labels))

    def _read_columns(self, path: Path) -> tuple[list[bytes | None], np.ndarray]:
        import pyarrow as pa
        import pyarrow.compute
        import pyarrow.parquet

        label_column = self._published.label_column
        needed = f"a struct column 'img' with the field 'bytes' and an integer column '{label_column}' without gaps"
        try:
            with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
                schema = file.schema_arrow
                found = ", ".join(f"{field.name}: {field.type}" for field in schema)
                column = "image" if "image" in schema.names and "img" not in schema.names else "img"
                if not (
                    {column, label_column} <= set(schema.names)
                    and pa.types.is_struct(schema.field(column).type)
                    and schema.field(column).type.get_field_index("bytes") >= 0
                    and pa.types.is_integer(schema.field(label_column).type)
                ):
                    raise DataError(f"{path} has the columns {found}; {self._published.title} needs {needed}.")
                table = file.read(columns=[f"{column}.bytes", label_column])
            if table[label_column].null_count:
                raise DataError(f"{path} has gaps in the column '{label_column}'; {needed} are needed.")
            encoded = pa.compute.struct_field(table[column], "bytes").to_pylist()
            return encoded, table[label_column].to_numpy().astype(np.int64)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise DataError(
                f"{path} is not a readable Parquet file ({error}). It is damaged or incomplete: fetch it again."
            ) from error


class ImageFolderLayout:
    """``{train,test}/<class>/*.png``: RGB images of one size; the classes are the folders' names in order.

    Numbers in names count as numbers: class 10 comes after class 9. Without ``test``, ``val`` is taken for it. Hidden
    files are left out.
    """

    worth_caching = True

    def __init__(self, folder: Path, published: NamedDataset | None) -> None:
        self.location, self._published = folder, published

    def key(self) -> str:
        files = [file for split in SPLITS for _, file in self._files[split]]
        return _digest_of_stats(self.location, files)

    def read(self) -> Decoded:
        size = self._published.size if self._published else None
        splits = []
        for split in SPLITS:
            labels, files = zip(*self._files[split], strict=True)
            expected = _expected_size(self._published) if self._published else "all images must be of one size"
            pixels = decode_images(files, size, lambda index, files=files: str(files[index]), expected)
            size = tuple(pixels.shape[1:3])
            splits.append(Images(pixels, torch.tensor(labels, dtype=torch.int64)))
        decoded = Decoded(*splits, self.classes)
        return _require_published(decoded, self._published, self.location) if self._published else decoded

    @cached_property
    def classes(self) -> tuple[str, ...]:
        names = {}
        for split in SPLITS:
            folder = self._folder(split)
            if not folder.is_dir():
                raise DataError(f"{folder} is missing: both {' and '.join(SPLITS)} are needed, with the same classes.")
            names[split] = {entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."}
            if not names[split]:
                raise DataError(f"{folder} has no class folders; put the images into one folder for each class.")
        if names["train"] != names["test"]:
            only = "; ".join(
                f"only in {split}: {', '.join(sorted(names[split] - names[other]))}"
                for split, other in (SPLITS, SPLITS[::-1])
                if names[split] - names[other]
            )
            raise DataError(f"{self.location}: train and test must have the same class folders ({only}).")
        if self._published and len(names["train"]) != len(self._published.classes):
            raise DataError(
                f"{self.location} has {len(names['train'])} class folders, but {self._published.title} has "
                f"{len(self._published.classes)} classes. Complete it, or give a data set of your own another name."
            )
        return tuple(sorted(names["train"], key=natural_order))

    @property
    def description(self) -> str:
        """The layout in words: also what was taken for the test set, left out, or put into an order of its own."""
        test = self._folder("test").name
        said = f"{self.location.name}/{{train,{test}}}/<class>/ (folders of images"
        if hidden := self._hidden():
            said += f"; {hidden} hidden {'files' if hidden > 1 else 'file'} left out"
        if all(name.isdecimal() for name in self.classes):
            said += "; classes in the order of their numbers"
        return said + ")"

    def _folder(self, split: str) -> Path:
        folder = self.location / split
        val = self.location / "val"
        return val if split == "test" and not folder.is_dir() and val.is_dir() else folder

    def _hidden(self) -> int:
        """How many hidden files lie among the images."""
        folders = [self._folder(split) / name for split in SPLITS for name in self.classes]
        return sum(1 for folder in folders for file in folder.iterdir() if file.name[0] == "." and file.is_file())

    @cached_property
    def _files(self) -> dict[str, list[tuple[int, Path]]]:
        """(label, file) of every image, by class and name."""
        return {split: list(self._files_of(split)) for split in SPLITS}

    def _files_of(self, split: str) -> Iterator[tuple[int, Path]]:
        for label, name in enumerate(self.classes):
            folder = self._folder(split) / name
            visible = (file for file in folder.iterdir() if file.name[0] != ".")  # not macOS's ._ files
            files = sorted(file for file in visible if file.suffix.lower() in SUFFIXES)
            if not files:
                raise DataError(f"{folder} holds no image ({', '.join(SUFFIXES)}); add some or remove the class.")
            yield from ((label, file) for file in files)


def natural_order(name: str) -> tuple:
    """A sort key by which numbers in names count as numbers: 2 before 10."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def read_digits() -> Decoded:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 pixels of 17 grey levels, each made a 4 x 4 block of RGB 0..255.

    A stratified fifth is the test set, always the same.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    everything = Images(
        torch.from_numpy(np.repeat(pixels[..., None], 3, axis=-1)), torch.from_numpy(digits.target.astype(np.int64))
    )
    test = stratified_sample(everything.labels, round(len(everything) / 5), generator_for("digits"))
    in_train = torch.ones(len(everything), dtype=torch.bool)
    in_train[test] = False
    return Decoded(everything.select(in_train.nonzero()[:, 0]), everything.select(test), tuple("0123456789"))


def _require_labels(labels: np.ndarray, num_classes: int, path: Path) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise DataError(
            f"{path}: image {wrong[0]} has the label {labels[wrong[0]]}, outside 0..{num_classes - 1}. "
            "The file is damaged or of another data set: fetch it again."
        )


def _require_published(decoded: Decoded, published: NamedDataset, folder: Path) -> Decoded:
    """Refuse a complete set that is not the published one: lossless WebP has no checksum and decodes when damaged."""
    for split, images, count, expected in zip(
        SPLITS, (decoded.train, decoded.test), published.counts, published.fingerprints or (None, None), strict=True
    ):
        if expected is not None and len(images) == count and fingerprint(images) != expected:
            raise DataError(
                f"{folder}: the {split} images have the number but not the content of {published.title}'s. They are "
                "damaged or were altered (recompressed as JPEG, say): fetch them again, or keep altered images as a "
                "folder of images under another name."
            )
    return decoded


def _expected_size(published: NamedDataset) -> str:
    return f"{published.title} images are {published.side} x {published.side}"


def _digest_of_stats(folder: Path, files: list[Path]) -> str:
    """A digest of the names, sizes and modification times of ``files``."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
