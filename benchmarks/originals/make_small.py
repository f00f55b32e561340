"""A llama of 21 million weights whose widths are multiples of 256, trained on train.txt of texts.py.

    python benchmarks/originals/make_small.py train.txt FOLDER --minutes 40 [--threads 2]
    gguf-convert FOLDER small-bf16.gguf

6 layers of 512, 8 heads of 64 with 4 of keys, 1536 in the ffn, an own byte-level BPE of 4096 tokens; embeddings tied.
Muon for the matrices, Adam for embeddings and norms, batches of 4 x 512 tokens, bfloat16 products; the rate falls to 0
over the second half of the minutes. A run continues a checkpoint in FOLDER, with the minutes that it had left.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from llama import Llama, Shape
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

_VOCAB, _BATCH, _LENGTH = 4096, 4, 512
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_RATE, _EMBEDDING_RATE = 3e-3, 4e-3
_SAVED_S = 240


def make_tokenizer(text: Path, folder: Path) -> Tokenizer:
    """The tokenizer of FOLDER, trained on the text if it is not there."""
    path = folder / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB, special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train([str(text)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    about = {
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "chat_template": _TEMPLATE, "add_bos_token": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
    return tokenizer


def encode(tokenizer: Tokenizer, text: Path, folder: Path) -> np.ndarray:
    """Ids of the text, uint16[n]; kept in FOLDER."""
    path = folder / "ids.npy"
    if not path.exists():
        whole = text.read_text()
        parts = [whole[i : i + 100_000] for i in range(0, len(whole), 100_000)]
        ids = [np.array(coded.ids, np.uint16) for coded in tokenizer.encode_batch(parts)]
        np.save(path, np.concatenate(ids))
    return np.load(path)


def batches(ids: np.ndarray, seed: int) -> Iterator[torch.Tensor]:
    """[4, 513] each, in a random order; every token once before any comes again."""
    draw = np.random.default_rng(seed)
    while True:
        starts = np.arange(draw.integers(_LENGTH), len(ids) - _LENGTH - 1, _LENGTH)
        draw.shuffle(starts)
        for i in range(0, len(starts) - _BATCH, _BATCH):
            rows = [ids[start : start + _LENGTH + 1] for start in starts[i : i + _BATCH]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


def rate(done: float) -> float:
    """Share of the full rate when this share of the time is over."""
    return min(1.0, (done + 0.002) / 0.02, max(0.0, 2 * (1 - done)))


def loss_of(model: Llama, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.logits(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@click.command()
@click.argument("text", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--minutes", default=40.0, help="To train in all.")
@click.option("--threads", default=2)
def main(text: Path, folder: Path, minutes: float, threads: int) -> None:
    """Train on TEXT; write a Hugging Face checkpoint into FOLDER."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ids = encode(make_tokenizer(text, folder), text, folder)
    model = Llama(Shape(_VOCAB))
    n_weights = sum(p.numel() for p in model.parameters())
    click.echo(f"{len(ids):,} tokens, {n_weights:,} weights")
    matrices = [p for name, p in model.named_parameters() if "proj" in name]
    others = [p for name, p in model.named_parameters() if "proj" not in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=_RATE, weight_decay=0.05, ns_steps=4, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=_EMBEDDING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    kept, step, before_s = folder / "checkpoint.pt", 0, 0.0
    if kept.exists():
        state = torch.load(kept)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, before_s = state["step"], state["seconds"]
    start = time.monotonic() - before_s
    saved_at, mean = time.monotonic(), math.nan
    for rows in batches(ids, step):
        seconds = time.monotonic() - start
        for optimizer, full in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = full * rate(seconds / 60 / minutes)
            optimizer.zero_grad(set_to_none=True)
        over = seconds > 60 * minutes
        if over or time.monotonic() - saved_at > _SAVED_S:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save(state | {"step": step, "seconds": seconds}, kept)
            model.save(folder)
            saved_at = time.monotonic()
        if over:
            break
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        mean = loss.item() if math.isnan(mean) else 0.95 * mean + 0.05 * loss.item()
        if step % 20 == 0 or step == 1:
            click.echo(f"step {step}: {step * _BATCH * _LENGTH:,} tokens, {seconds / 60:.1f} min, loss {mean:.3f}")
    click.echo(f"{step} steps, {step * _BATCH * _LENGTH:,} tokens, {minutes} min, loss {mean:.3f}")


if __name__ == "__main__":
    main()
