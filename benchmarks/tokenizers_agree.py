"""Checks that tokenizers of checkpoints and of their GGUF metadata give equal ids for random multilingual texts.

    python benchmarks/tokenizers_agree.py [-n 10000] [MODEL.gguf | DIR ...]

Without names, tokenizers of every kind are trained on a few texts (tests/helpers/hftokenizers.py). DIR: a checkpoint
with a tokenizer.json. MODEL.gguf: a file whose tokenizer is exported, then converted again.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.convert.back.tokenizer import tokenizer_files
from gguf_run.runtime.convert.vocabulary.metadata import tokenizer_metadata
from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parent.parent / "tests/helpers"))
N_SPECIAL = 100  # special tokens that come up in texts


def sources(names: list[str], directory: Path) -> Iterator[tuple[str, Path, list[Tokenizer]]]:
    """Yield a name, a folder with its tokenizer.json, and tokenizers that must agree with it."""
    import hftokenizers

    for name in names or hftokenizers.KINDS:
        path = directory / name.replace("/", "_") if not Path(name).is_dir() else Path(name)
        path.mkdir(exist_ok=True)
        found: list[Tokenizer] = []
        config: dict[str, Any] = {}
        if name in hftokenizers.KINDS:
            hftokenizers.write(path, name)
        elif not Path(name).is_dir():
            with GGUFFile.open(name) as file:
                found.append(Tokenizer.from_metadata(file.metadata))
                for file_name, value in tokenizer_files(file.metadata).items():
                    (path / file_name).write_text(json.dumps(value))
        elif (path / "config.json").is_file():
            config = json.loads((path / "config.json").read_text())
        yield name, path, [*found, Tokenizer.from_metadata(tokenizer_metadata(path, config))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=10_000)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    import hftokenizers

    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        for name, path, tokenizers in sources(given.names, Path(directory)):
            original = HfTokenizer.from_file(str(path / "tokenizer.json"))
            special = hftokenizers.special_names(original)[:N_SPECIAL]
            bad: set[str] = set()
            for text in hftokenizers.texts(given.n, special=special):
                if any(tokenizer.encode(text) != original.encode(text).ids for tokenizer in tokenizers):
                    bad.add(text)
            example = f", such as {min(bad, key=len)!r}" if bad else ""
            print(f"{name}: {len(bad)} of {given.n} texts have other ids{example}", flush=True)
            wrong += len(bad)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
