"""Parquet files of encoded images, as Hugging Face distributes them."""

import hashlib
import re
from pathlib import Path

import numpy as np
import torch

from apbm_core.errors import DataError
from apbm_core.study.data.definition import SPLITS, Decoded, expected_size, require_published
from apbm_core.study.data.images import Images, decode_images
from apbm_core.study.data.named import NamedDataset

_PART = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")  # a download may put a hash behind the numbers


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
        return require_published(Decoded(train, test, self.classes), self._published, self.location)

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
            encoded, self._published.size, lambda index: f"{path}: image {index}", expected_size(self._published)
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


def _require_labels(labels: np.ndarray, num_classes: int, path: Path) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise DataError(
            f"{path}: image {wrong[0]} has the label {labels[wrong[0]]}, outside 0..{num_classes - 1}. "
            "The file is damaged or of another data set: fetch it again."
        )
