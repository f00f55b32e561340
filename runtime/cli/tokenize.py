"""gguf-tokenize: the tokens of a text, by a model's own tokenizer."""

from pathlib import Path

import click

from gguf_run.formats.gguf.found import check_model
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli import complete
from gguf_run.runtime.cli.common import tool
from gguf_run.runtime.hub.find import find_model
from gguf_run.runtime.terminal.text_input import read_stdin, read_text

# Lines printed by one write: single lines are slow, and `| head` would wait for all lines together.
LINES_AT_ONCE = 1000


@tool(
    "gguf-tokenize",
    examples=(
        'gguf-tokenize model.gguf "Hello world"',
        'gguf-tokenize model.gguf "Hello world" --ids',
        "gguf-tokenize model.gguf --file book.txt --count",
    ),
)
@click.argument("model", shell_complete=complete.models)
@click.argument("text", required=False)
@click.option("--file", "-f", "path", type=click.Path(path_type=Path), help="Read the text from a UTF-8 file.")
@click.option("--ids", "only_ids", is_flag=True, help="Print one list of ids.")
@click.option("--count", is_flag=True, help="Print only how many tokens there are.")
@click.option("--no-special", is_flag=True, help="Add no BOS or EOS, and read <|im_start|> and the like as plain text.")
def main(model: str, text: str | None, path: Path | None, only_ids: bool, count: bool, no_special: bool) -> None:
    """Print the tokens of TEXT, of a file, or of stdin.

    Each line has an id and the token's text as Python writes it, with b'...' for bytes that are no whole character.

    MODEL is a GGUF file or hf:owner/repo[:Q4_K_M].
    """
    if text is not None and path is not None:
        raise click.UsageError("give TEXT or --file, not both")
    if only_ids and count:
        raise click.UsageError("give --ids or --count, not both")
    if text is None:
        text = read_text(path) if path is not None else read_stdin()

    from gguf_run.runtime.tokenizers.tokenizer import Tokenizer

    with GGUFFile.open(find_model(model)) as file:
        if "tokenizer.ggml.model" not in file.metadata:  # an adapter or a projector, say
            check_model(file.path, file.metadata, n_tensors=1)
        tokenizer = Tokenizer.from_metadata(file.metadata)
    ids = tokenizer.encode(text, add_special=not no_special, parse_special=not no_special)
    if count:
        click.echo(len(ids))
    elif only_ids:
        click.echo(ids)
    else:
        for start in range(0, len(ids), LINES_AT_ONCE):
            lines = [f"{id:>7} {_show(tokenizer.piece(id))}" for id in ids[start : start + LINES_AT_ONCE]]
            click.echo("\n".join(lines))


def _show(piece: bytes) -> str:
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)
