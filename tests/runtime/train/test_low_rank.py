"""gguf-train lora: losses against transformers with pairs, adapters in the engine, resuming, what is refused."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_tiny
import torch
from click.testing import CliRunner
from tinymodel import QKV, TINY_GEMMA3, Tiny, tiny_moe, write_tiny

from gguf_run.formats.errors import FormatError, GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli.train import main
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint
from gguf_run.runtime.model import Model
from gguf_run.runtime.train.data import Batches, Example, Reader
from gguf_run.runtime.train.loop import Trainer, TrainOptions
from gguf_run.runtime.train.losses import cross_entropy
from gguf_run.runtime.train.low_rank import LoraOptions, LowRank, lora
from gguf_run.runtime.train.model import TorchModel

WORDS = (
    "the", "cat", "and", "dog", "in", "our", "other", "house", "ate", "nine", "round", "onions", "there", "on", "hour",
)  # fmt: skip
IDS = [5, 9, 30, 44, 200, 7, 81]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def texts(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 5 + i % 7)) for i in range(n)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data, and a model with attention, a gate, biases and norms of F32."""
    write_tiny(tmp_path / "m.gguf", Tiny(biases=QKV))
    for name, n in (("train", 24), ("valid", 6)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts(n)))
    return tmp_path


OPTIONS = TrainOptions(iters=6, batch_size=3, learning_rate=2e-3, max_seq_length=64, steps_per_report=1)


class _Plain(torch.nn.Module):
    """Hu et al., 2021: W x + scale B A x."""

    def __init__(self, base: Any, a: Any, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.a, self.b = torch.nn.Parameter(a.clone()), torch.nn.Parameter(torch.zeros(base.out_features, len(a)))

    def forward(self, x: Any) -> Any:
        return self.base(x) + self.scale * torch.nn.functional.linear(torch.nn.functional.linear(x, self.a), self.b)


MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def with_plain(model: Any, first: dict[str, Any], scale: float) -> list[Any]:
    """Put pairs beside all matrices. Return what is trained. first: each A, by the module's name."""
    model.requires_grad_(False)
    found = []
    for name, a in first.items():
        parent, _, last = name.rpartition(".")
        pair = _Plain(model.get_submodule(name), a, scale)
        setattr(model.get_submodule(parent), last, pair)
        found += [pair.a, pair.b]
    return found


def with_peft(model: Any, first: dict[str, Any], scale: float) -> list[Any]:
    peft = pytest.importorskip("peft")
    rank = len(next(iter(first.values())))
    config = peft.LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=[*first], lora_dropout=0.0)
    made = peft.get_peft_model(model, config)
    numbers = dict(made.named_parameters())
    for name, a in first.items():
        numbers[f"base_model.model.{name}.lora_A.default.weight"].data.copy_(a)
    return [x for x in numbers.values() if x.requires_grad]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about peft
@pytest.mark.parametrize("pairs", [with_plain, with_peft])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_losses_are_those_of_transformers(pairs: Callable[..., list[Any]], name: str, tmp_path: Path) -> None:
    """100 steps of one seed, data and order, all in F32. The rows of q and k are in another order in the GGUF file."""
    other, scale, n_steps = hf_tiny.make(name, tmp_path), 4.0, 100
    with open_checkpoint(tmp_path) as file:
        made = TorchModel(file, 64)
        task = LowRank(made, LoraOptions(rank=4, scale=scale, num_layers=-1), seed=1)
        first = {}
        for full in made.backend.adapted:
            il, end = full.split(".")[1:3]
            first[f"model.layers.{il}.{MODULES[end]}"] = made.backend.adapted[full].a.detach().clone()
        trained = pairs(other, first, scale)
        rng = np.random.default_rng(0)
        starts = rng.integers(3, hf_tiny.N_VOCAB - 20, 16)  # what follows is learned: counting
        examples = [Example(tuple(range(at, at + 8 + i)), 0) for i, at in enumerate(starts)]
        batches = Batches(examples, 4, 0, 64)
        optimizers = [torch.optim.Adam(numbers, 1e-3) for numbers in (task.numbers.values(), trained)]
        losses: list[list[float]] = []
        for step in range(n_steps):
            batch, row = batches.at(step), []
            ids, targets = torch.from_numpy(batch.ids), torch.from_numpy(batch.targets).reshape(-1)
            for i, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                if i == 0:
                    loss = cross_entropy(made, batch) / batch.n_tokens
                else:
                    logits = other(ids).logits.reshape(len(targets), -1)
                    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1)
                loss.backward()
                optimizer.step()
                row.append(float(loss.detach()))
            losses.append(row)
    ours, theirs = np.array(losses).T
    assert theirs[-1] < 0.6 * theirs[0]
    print(f"{name}, {pairs.__name__}: {theirs[0]:.4f} to {theirs[-1]:.4f}, largest difference", end=" ")
    print(f"{np.abs(ours / theirs - 1).max():.1e}")
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


ENGINES = {"llama": Tiny(biases=QKV), "gemma3": replace(TINY_GEMMA3, window=0), "experts": tiny_moe(2)}


@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_has_the_logits_of_training(name: str, folder: Path) -> None:
    write_tiny(folder / "m.gguf", ENGINES[name])
    losses = lora(folder / "m.gguf", folder, folder / "a.gguf", OPTIONS, LoraOptions(rank=3, num_layers=1))
    assert losses.valid[-1][1] < losses.valid[0][1]
    with GGUFFile.open(folder / "a.gguf") as adapter:
        assert {full.split(".")[1] for full in adapter.tensors} == {str(ENGINES[name].n_layer - 1)}
        assert adapter.metadata["adapter.lora.alpha"] == 60
    with GGUFFile.open(folder / "m.gguf") as file, torch.no_grad():
        made = TorchModel(file, 32)
        LowRank(made, LoraOptions(rank=3, num_layers=1, resume_adapter_file=folder / "a.gguf"), 0)
        expected = made.logits(IDS).numpy()
        made.backend.adapted.clear()
        assert np.abs(made.logits(IDS).numpy() - expected).max() > 0.01
    with Model.load(folder / "m.gguf", lora=[folder / "a.gguf"], cache_type="f32", device="cpu") as model:
        np.testing.assert_allclose(model.logits(IDS), expected, atol=1e-4)


def test_going_on_is_as_if_there_was_no_end(folder: Path) -> None:
    pairs = LoraOptions(dropout=0.2)
    whole = lora(folder / "m.gguf", folder, folder / "whole.gguf", OPTIONS, pairs)
    for n, resume in ((4, False), (6, True)):
        steps = replace(OPTIONS, iters=n, resume=resume)
        parts = lora(folder / "m.gguf", folder, folder / "parts.gguf", steps, pairs)
    assert parts.train == whole.train
    with GGUFFile.open(folder / "whole.gguf") as a, GGUFFile.open(folder / "parts.gguf") as b:
        for name, tensor in a.tensors.items():
            np.testing.assert_array_equal(tensor.blocks(), b.tensors[name].blocks())
    write_tiny(folder / "m.gguf", Tiny(biases=QKV, seed=3))
    with pytest.raises(GgufRunError, match=r"parts.gguf.state: is of another model or other options"):
        lora(folder / "m.gguf", folder, folder / "parts.gguf", replace(OPTIONS, resume=True))
    (folder / "parts.gguf.state").write_bytes(b"none")
    with pytest.raises(FormatError, match=r"parts.gguf.state: is damaged or no state"):
        lora(folder / "m.gguf", folder, folder / "parts.gguf", replace(OPTIONS, resume=True))
    with pytest.raises(GgufRunError, match=r"no.gguf.state: No such file.*--resume goes on from there"):
        lora(folder / "m.gguf", folder, folder / "no.gguf", replace(OPTIONS, resume=True))


def test_batches_of_a_step_are_one_batch(folder: Path) -> None:
    """24 texts of one length: two batches of 3 have the gradients of one of 6, if these are the same texts."""
    (folder / "train.jsonl").write_text(f"{json.dumps({'text': WORDS[0]})}\n" * 24)
    one, two = (
        lora(folder / "m.gguf", folder, folder / "a.gguf", replace(OPTIONS, batch_size=size, grad_accumulation_steps=n))
        for size, n in ((6, 1), (3, 2))
    )
    np.testing.assert_allclose(one.train, two.train, rtol=1e-5)


_RANK = """
import sys, torch
from gguf_run.runtime.train import TrainOptions, lora
torch.set_num_threads(1)
folder = sys.argv[1]
options = TrainOptions(iters=6, batch_size=3, learning_rate=2e-3, max_seq_length=64, steps_per_report=1)
losses = lora(f"{folder}/m.gguf", folder, f"{folder}/two.gguf", options, report=print)
if torch.distributed.get_rank() == 0:
    print("LOSSES", [loss for _, loss in losses.train])
"""


def test_two_processes_are_two_batches_of_a_step(folder: Path) -> None:
    (folder / "rank.py").write_text(_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, folder / "rank.py", folder], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6: loss") == 1
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("LOSSES"))[7:])
    alone = lora(folder / "m.gguf", folder, folder / "one.gguf", replace(OPTIONS, grad_accumulation_steps=2))
    np.testing.assert_allclose(found, [loss for _, loss in alone.train], rtol=1e-5)
    with GGUFFile.open(folder / "one.gguf") as a, GGUFFile.open(folder / "two.gguf") as b:
        for name, tensor in a.tensors.items():
            one, two = (file.tensors[name].blocks().view(np.float32) for file in (a, b))
            np.testing.assert_allclose(one, two, atol=1e-4, err_msg=tensor.name)


def test_ctrl_c_keeps_what_was_reached(folder: Path) -> None:
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if line.startswith("step 3: loss"):
            signal.raise_signal(signal.SIGINT)

    (folder / "test.jsonl").write_bytes((folder / "valid.jsonl").read_bytes())
    lora(folder / "m.gguf", folder, folder / "a.gguf", OPTIONS, report=report)
    assert lines[-1] == "ended after step 3; to go on: --resume"
    losses = lora(folder / "m.gguf", folder, folder / "a.gguf", replace(OPTIONS, resume=True), report=lines.append)
    assert losses.train[-1][0] == 6
    assert lines[-1] == f"test loss {losses.valid[-1][1]:.4f}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_no_number_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the last step that was saved stays."""
    with GGUFFile.open(folder / "m.gguf") as file:
        task = LowRank(TorchModel(file, 32), LoraOptions(), 0)
        trainer = Trainer(task, file, folder, folder / "a.gguf", replace(OPTIONS, save_every=2))

        def stepped(step: int) -> None:
            task.numbers["blk.0.attn_q.weight.lora_b"].data.fill_(np.nan if step > 2 else 0)

        monkeypatch.setattr(task, "stepped", stepped)
        with pytest.raises(
            GgufRunError, match=r"the loss is nan in step 4: lower --learning-rate; .*a.gguf is that of an"
        ):
            trainer.run()
        LowRank(TorchModel(file, 32), LoraOptions(resume_adapter_file=folder / "a.gguf"), 0)


def test_what_is_learned(folder: Path) -> None:
    """Answers alone, with --mask-prompt; the token behind each token otherwise."""
    with GGUFFile.open(folder / "m.gguf") as file:
        messages = [{"role": role, "content": text} for role, text in (("user", "the cat"), ("assistant", "the dog"))]
        rows = [{"messages": messages}, {"prompt": "the cat", "completion": "the dog"}, {"text": "the cat"}]
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tokenizer = Reader(file, 64).tokenizer
        chat, completion, text = Reader(file, 64, mask_prompt=True).read(folder, "train")
        assert chat == completion
        answer = tokenizer.decode(chat.ids[chat.n_prompt :])
        assert answer == "the dog<|im_end|>\n"
        assert tokenizer.decode(chat.ids[: chat.n_prompt]).endswith("the cat<|im_end|>\n<|im_start|>assistant\n")
        assert text == Example((*tokenizer.encode("the cat"), tokenizer.eos), 0)
        batch = Batches([chat, text], 2, 0, 64).at(0)
        assert batch.ids.shape == (2, 32)
        for row, one in zip(batch.targets[::-1], (chat, text), strict=True):
            assert tuple(row[row >= 0]) == one.ids[max(1, one.n_prompt) :]
        (folder / "text.txt").write_text(" ".join(texts(200)))
        n_train, n_valid = (len(Reader(file, 32).read(folder / "text.txt", name)) for name in ("train", "valid"))
        assert n_train > 10 * n_valid > 10


BAD_DATA = {
    "": (FormatError, r"train.jsonl: is empty"),
    "{}\n{": (FormatError, r"line 1 has the keys none: allowed are"),
    '{"text": "a"}\nno': (FormatError, r"line 2 is not JSON \(.*\): one object a line is allowed"),
    "[1]": (FormatError, r"line 1 has no object: allowed are"),
    '{"prompt": "a"}': (FormatError, r"line 1 has the keys prompt: allowed are"),
    '{"text": 3}': (FormatError, r'line 1: "text" is no string'),
    '{"messages": []}': (FormatError, r'line 1: "messages" must be a list of messages'),
    '{"messages": [{"content": "a"}]}': (GgufRunError, r"line 1: messages\[0\].role is missing"),
}


@pytest.mark.parametrize("text", BAD_DATA)
def test_bad_data(text: str, folder: Path) -> None:
    kind, words = BAD_DATA[text]
    (folder / "train.jsonl").write_text(text)
    with pytest.raises(kind, match=words):
        lora(folder / "m.gguf", folder, folder / "a.gguf", OPTIONS)


def test_long_texts_are_cut(folder: Path) -> None:
    (folder / "valid.jsonl").unlink()
    (folder / "train.jsonl").write_text(json.dumps({"text": "the cat " * 40}))
    with pytest.warns(UserWarning, match=r"1 of 1 texts are longer than 8 tokens: their ends are left out"):
        lora(folder / "m.gguf", folder, folder / "a.gguf", replace(OPTIONS, max_seq_length=8))
    (folder / "train.jsonl").unlink()
    with pytest.raises(FormatError, match=r"has no train.jsonl"):
        lora(folder / "m.gguf", folder, folder / "a.gguf", OPTIONS)


def test_out_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, ids: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(TorchModel, "hidden", fail)
    with pytest.raises(
        GgufRunError, match=r"a batch of 4 texts of up to 64 tokens does not fit .*: try --batch-size 2 "
    ):
        lora(folder / "m.gguf", folder, folder / "a.gguf", replace(OPTIONS, batch_size=4))


def run(*args: Any) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    return result.exit_code, result.output.strip().splitlines()[-1]


def test_the_command(folder: Path) -> None:
    base = ("lora", folder / "m.gguf", "--data", folder, "-o", folder / "a.gguf", "--max-seq-length", 64)
    code, line = run(*base, "--iters", 2, "--keys", "attn_q", "--keys", "ffn_up", "--rank", 2, "--num-layers", 1)
    assert (code, line) == (0, f"{folder}/a.gguf is written; losses: {folder}/a.gguf.svg")
    with GGUFFile.open(folder / "a.gguf") as file:
        assert {name.split(".")[2] for name in file.tensors} == {"attn_q", "ffn_up"}
    for args, words in (
        (("--rank", 0), "--rank 0 --num-layers 16 --dropout 0.0 --scale 20.0: allowed are a rank from 1"),
        (("--keys", "attn_x"), "--keys attn_x: the model has no such matrices; it has attn_k attn_output attn_q"),
        (("-o", folder / "adapter" / "a.gguf"), "adapter/a.gguf: there is no folder"),
        (("--iters", 0), "--iters is 0; allowed: whole numbers from 1"),
        (("--learning-rate", 2), "--learning-rate is 2.0; allowed: numbers between 0 and 1"),
        (("--lr-schedule", "x"), "--lr-schedule is x; allowed: constant, cosine"),
        (("--device", "tpu"), "--device tpu: torch has no such device here; allowed: cpu and auto"),
        (("--max-seq-length", 1000), "--max-seq-length is 1000: the model was trained with 128 tokens"),
        (
            ("--resume-adapter-file", folder / "a.gguf"),
            "a.gguf: has a pair of rank 2 for blk.1.attn_q.weight",
        ),
    ):
        code, line = run(*base, *args)
        assert words in line
        assert code == (1 if "adapter" in str(args) else 2)


def test_options_that_are_not_allowed() -> None:
    with pytest.raises(OptionError, match=r"--val-batches is -2; allowed: whole numbers from -1"):
        TrainOptions(val_batches=-2)
    rates = [TrainOptions(iters=100, lr_schedule="cosine", learning_rate=1e-3).rate(i) for i in range(100)]
    assert max(rates) <= 1e-3
    assert rates[0] == pytest.approx(2e-4)
    assert rates[99] < 1e-5
