"""A method of the user's own, in a Python file: named by its path, told apart by its content."""

import sys
import traceback
from functools import lru_cache
from importlib import util
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from apbm_core.errors import ConfigError
from apbm_core.files import sha256
from apbm_core.study.methods.definition import Method, read


def load(path: str) -> Method:
    """The method that the file defines, called by the file's path.

    Its options are the file's own with the file's SHA-256 as one more. So the content is part of what identifies a
    run: an edited criterion is a new run, and the old one's record stays.

    Raises:
        ConfigError: there is no such file, it cannot be executed, or it does not define what a method needs.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the method {path!r} is a file that cannot be read ({error.strerror}); relative paths start from "
            f"{Path.cwd()}."
        ) from None
    return _method(path, content)


@lru_cache(maxsize=32)
def _method(path: str, content: bytes) -> Method:
    digest = sha256(content)
    name = f"apbm_method_{Path(path).stem}_{digest[:10]}"
    module = util.module_from_spec(util.spec_from_file_location(name, path))
    sys.modules[name] = module  # where dataclasses and pydantic look up a class's module
    try:
        exec(compile(content, path, "exec"), module.__dict__)  # what was hashed, not what the file says by now
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}. Correct the file.") from error
    method = read(module, path, path)
    return method.with_options(_with_source(method.Options, path, digest))


def _with_source(options: type[BaseModel], path: str, digest: str) -> type[BaseModel]:
    """``options`` with the file's digest among them, and refusing unknown ones like every other method's."""

    class Options(options):
        model_config = ConfigDict(frozen=True, extra="forbid")

        source_sha256: str = Field(digest, description="the content of the method's file")

        @field_validator("source_sha256")
        @classmethod
        def _is_current(cls, value: str) -> str:
            if value != digest:
                raise ValueError(f"{path} was edited since this run was asked for; start the study again.")
            return value

    return Options
