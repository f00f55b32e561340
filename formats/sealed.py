"""Files that only this program writes: safetensors files with a kind, a version and checksums."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf_run.formats.errors import FormatError, UnsupportedError
from gguf_run.formats.gguf.mapped import check_kind
from gguf_run.formats.safetensors import SafetensorsFile, read_safetensors

VERSION = "2"


@dataclass(frozen=True)
class FileKind:
    """A kind of file. Its metadata is texts, sealed with a checksum; the arrays have checksums of their own."""

    name: str  # "session"
    old_magic: bytes  # the first bytes of files of version 1, which had a layout of their own
    again: str  # what to do where a file cannot be read

    def seal(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """Return metadata for a new file: with kind, version and checksum."""
        texts = {"kind": self.name, "version": VERSION, **metadata}
        return texts | {"crc32": _checksum(texts)}

    def open(self, path: Path) -> SafetensorsFile:
        """Map a file and check its metadata. FormatError, one line, if it is none of this kind, old or damaged.

        GgufRunError for a folder, a device or a pipe, OSError if there is nothing.
        """
        check_kind(path)
        with path.open("rb") as stream:
            is_old = stream.read(len(self.old_magic)) == self.old_magic
        if is_old:
            raise FormatError(f"{path}: is a {self.name} of an earlier version of this program: {self.again}")
        try:
            file = read_safetensors(path)
        except (FormatError, UnsupportedError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise FormatError(f"{path}: is not a {self.name}, or it is damaged ({reason}): {self.again}") from None
        texts = dict(file.metadata)
        checksum = texts.pop("crc32", "")
        if texts.get("kind") != self.name:
            raise FormatError(f"{path}: is not a {self.name}: {self.again}")
        if texts.get("version") != VERSION:
            raise FormatError(
                f"{path}: is a {self.name} of version {texts.get('version')}, this program reads {VERSION}: "
                f"{self.again}"
            )
        if checksum != _checksum(texts):
            raise self.damaged(path, "the checksum of its header differs")
        return file

    def damaged(self, path: Path, what: str) -> FormatError:
        """Return (not raise) the error of a damaged file."""
        return FormatError(f"{path}: the {self.name} is damaged: {what}: {self.again}")


def _checksum(texts: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(texts, sort_keys=True).encode()):08x}"
