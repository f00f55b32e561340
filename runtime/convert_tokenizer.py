"""A checkpoint's tokenizer as GGUF metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf_run.formats.errors import UnsupportedError
from gguf_run.formats.writer_metadata import MetaValue


def tokenizer_metadata(directory: Path, config: Mapping[str, Any]) -> dict[str, MetaValue]:
    """Return tokenizer.* keys. config: config.json, that of the text model on top."""
    raise UnsupportedError(f"{directory}: converting tokenizers is not there yet")
