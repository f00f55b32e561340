"""Reading checkpoints: one clear line for everything that is wrong with a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_tiny
import numpy as np
import pytest
from quantpack import write_safetensors

from gguf_run.formats.errors import GgufRunError
from gguf_run.runtime.convert.open_checkpoint import open_checkpoint

X = np.arange(12, dtype=np.float32).reshape(3, 4)


Tensors = dict[str, tuple[str, Any]]
UP = "model.layers.1.mlp.up_proj.weight"


def changed(folder: Path, change: Callable[[Path, Tensors, dict[str, Any]], None]) -> None:
    """A llama checkpoint whose tensors and config went through `change`."""
    tensors = hf_tiny.plain_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    change(folder, tensors, config)
    (folder / "config.json").write_text(json.dumps(config))
    if (folder / "model.safetensors").exists():
        write_safetensors(folder / "model.safetensors", tensors)


def index(folder: Path, tensors: Tensors, **places: str) -> None:
    """Two shards; places: where the index has a tensor, by its name with _ for the dots."""
    (folder / "model.safetensors").unlink()
    parts = {"one.safetensors": dict(list(tensors.items())[:5]), "two.safetensors": dict(list(tensors.items())[5:])}
    for name, part in parts.items():
        write_safetensors(folder / name, part)
    weight_map = {name: file for file, part in parts.items() for name in part}
    weight_map.update({name: places.get(name.replace(".", "_"), file) for name, file in weight_map.items()})
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


WRONG: dict[str, tuple[Callable[[Path, Tensors, dict[str, Any]], Any], str]] = {
    "no weights": (lambda f, t, c: (f / "model.safetensors").unlink(), "there are no weights: model.safetensors"),
    "missing shard": (
        lambda f, t, c: (index(f, t), (f / "two.safetensors").unlink()),
        r"two.safetensors is missing \(1 of 2 files\)",
    ),
    "tensor in another file than the index says": (
        lambda f, t, c: index(f, t, **{UP.replace(".", "_"): "one.safetensors"}),
        f'two.safetensors: holds tensor "{UP}", which model.safetensors.index.json has in "one.safetensors"',
    ),
    "index without that tensor": (
        lambda f, t, c: (index(f, t), write_safetensors(f / "one.safetensors", {"x": ("F32", X)})),
        'holds tensor "x", which model.safetensors.index.json has nowhere',
    ),
    "index with too many tensors": (
        lambda f, t, c: (index(f, t), write_safetensors(f / "one.safetensors", dict(list(t.items())[:1]))),
        r"says that .* is in one.safetensors, but it is not \(4 such tensors\)",
    ),
    "index that leads elsewhere": (
        lambda f, t, c: index(f, t, model_norm_weight="../one.safetensors"),
        r'names the file "\.\./one.safetensors": must be one in the same folder',
    ),
    "index of nothing": (
        lambda f, t, c: (f / "model.safetensors").rename(f / "one") and write_index(f, 3),
        "weight_map does not tell the file of each tensor",
    ),
    "wrong shape": (
        lambda f, t, c: t.update({UP: ("F32", np.zeros((511, 256)))}),
        "blk.1.ffn_up.weight has 256 x 511 values, must have 256 x 512 in this llama model",
    ),
    "config of another model": (lambda f, t, c: c.update(num_key_value_heads=4), "must have 256 x 256"),
    "missing tensor": (lambda f, t, c: t.pop(UP), "blk.1.ffn_up.weight is missing, must have 256 x 512"),
    "more layers than config.json says": (lambda f, t, c: c.update(num_hidden_layers=1), "llama model of 1 layers"),
    "fewer layers": (lambda f, t, c: c.update(num_hidden_layers=3), "blk.2.attn_norm.weight is missing"),
    "layers without end": (lambda f, t, c: c.update(num_hidden_layers=10**9), "block_count is 1000000000, must be"),
    "an empty tensor": (lambda f, t, c: t.update({UP: ("F32", np.zeros((0, 256)))}), "has no values"),
    "experts of two dimensions": (
        lambda f, t, c: t.update({"model.layers.1.mlp.experts.gate_up_proj": ("F32", X)}),
        r"has the shape \[3, 4\], of which ffn_gate_exps and ffn_up_exps cannot be made",
    ),
    "an odd number of rows": (
        lambda f, t, c: t.update({"model.layers.1.mlp.experts.gate_up_proj": ("F32", X[None])}),
        r"has the shape \[1, 3, 4\], of which",
    ),
    "rotary part": (
        lambda f, t, c: c.update(rope_scaling={"partial_rotary_factor": 2e9}),
        r"partial_rotary_factor is 2000000000.0, must be 1 in a llama model",
    ),
    "rotary factors": (
        lambda f, t, c: c.update(rope_scaling={"rope_type": "llama3", "factor": 0, "rope_theta": -1}),
        "rope_theta or factor is -1, must be numbers that make rotary factors above 0",
    ),
    "unknown tensor": (
        lambda f, t, c: t.update({"model.layers.1.mlp.extra.weight": ("F32", X)}),
        '"model.layers.1.mlp.extra.weight" is not a part of a llama model of 2 layers',
    ),
    "integers": (lambda f, t, c: t.update({UP: ("I32", np.zeros((512, 256)))}), "has values of type I32"),
    "unknown architecture": (
        lambda f, t, c: c.update(architectures=["MambaForCausalLM"]),
        r'architectures is \["MambaForCausalLM"\], must be one of \d+ that can be converted: Llama\w+, \w+, \w+ have',
    ),
    "no architecture": (lambda f, t, c: (c.pop("architectures"), c.pop("model_type")), "architectures is missing"),
    "unknown quantization": (
        lambda f, t, c: c.update(quantization_config={"quant_method": "hqq"}),
        "hqq",
    ),
    "activation": (lambda f, t, c: c.update(hidden_act="relu"), 'hidden_act is "relu", must be silu or swish'),
    "rope": (lambda f, t, c: c.update(rope_scaling={"type": "ntk"}), "rope_type is .ntk., must be one of default"),
    "rope list": (lambda f, t, c: c.update(rope_scaling={"rope_type": ["yarn"]}), "rope_type is ..yarn.., must be"),
    "number": (lambda f, t, c: c.update(hidden_size="256"), "hidden_size is .*, must be a whole number from 1"),
    "no number": (lambda f, t, c: c.pop("num_attention_heads"), "num_attention_heads is missing"),
    "epsilon": (lambda f, t, c: c.update(rms_norm_eps=[1]), r"rms_norm_eps is .*, must be a number"),
    "rows": (lambda f, t, c: t.update({"model.embed_tokens.weight": ("F32", X)}), "has 3 rows for 300 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    change, error = WRONG[case]
    changed(tmp_path, lambda *parts: change(*parts) and None)
    with pytest.raises(GgufRunError, match=error) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100000, '{"a": ' + "9" * 5000 + "}"])
def test_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(GgufRunError, match=r"config\.json: (is not JSON|holds no JSON object)"):
        open_checkpoint(tmp_path)
    with pytest.raises(GgufRunError, match=r"elsewhere: no such folder"):
        open_checkpoint(tmp_path / "elsewhere")


def test_shards_are_one_model(tmp_path: Path) -> None:
    hf_tiny.plain_llama(tmp_path / "one")
    changed(tmp_path / "two", lambda folder, tensors, config: index(folder, tensors))
    with open_checkpoint(tmp_path / "one") as one, open_checkpoint(tmp_path / "two") as two:
        assert {n: t.blocks().tobytes() for n, t in one.tensors.items()} == {
            n: t.blocks().tobytes() for n, t in two.tensors.items()
        }


def test_shards_without_an_index(tmp_path: Path) -> None:
    hf_tiny.plain_llama(tmp_path / "one")

    def counted(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
        (folder / "model.safetensors").unlink()
        parts = list(tensors.items())
        for no, part in enumerate((parts[:5], parts[5:9], parts[9:]), 1):
            write_safetensors(folder / f"model-{no:05d}-of-00003.safetensors", dict(part))

    changed(tmp_path / "two", counted)
    with open_checkpoint(tmp_path / "one") as one, open_checkpoint(tmp_path / "two") as two:
        assert {n: t.blocks().tobytes() for n, t in one.tensors.items()} == {
            n: t.blocks().tobytes() for n, t in two.tensors.items()
        }
    third, last = (tmp_path / "two" / f"model-0000{no}-of-00003.safetensors" for no in (2, 3))
    last.write_bytes(third.read_bytes())
    with pytest.raises(GgufRunError, match=r"00003-of-00003\.safetensors: holds tensor .*, as a file before it does"):
        open_checkpoint(tmp_path / "two")
    third.unlink()
    with pytest.raises(
        GgufRunError, match=r"model-00002-of-00003\.safetensors is missing \(1 of 3 files\), and so is the"
    ):
        open_checkpoint(tmp_path / "two")


def test_a_key_that_occurs_twice(tmp_path: Path) -> None:
    """As Python reads JSON, and so transformers: the last one counts."""
    hf_tiny.plain_llama(tmp_path)
    path = tmp_path / "config.json"
    path.write_text('{"rms_norm_eps": 0.5,' + path.read_text().lstrip()[1:])
    with open_checkpoint(tmp_path) as file:
        assert file.metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(
            json.loads(path.read_text())["rms_norm_eps"]
        )


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"])
def test_pointers_of_git_lfs(tmp_path: Path, name: str) -> None:
    hf_tiny.plain_llama(tmp_path)
    (tmp_path / name).write_bytes(LFS)
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(GgufRunError, match=rf"{name}: is a Git LFS pointer, not the file itself: fetch it with"):
        open_checkpoint(tmp_path)


def test_what_is_there_instead_of_a_checkpoint(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    hf_tiny.plain_llama(base)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for path, words in (
        (adapter, 'is an adapter \\(LoRA\\) for "owner/name", not a model: convert it with gguf-convert, then'),
        (base / "model.safetensors", f"is a file: name the folder of the checkpoint, {base}"),
        (tmp_path / "m.gguf", "is a GGUF file already: gguf-quantize changes its types"),
        (tmp_path / "other", 'holds "notes.txt": there is no config.json: name the folder'),
    ):
        with pytest.raises(GgufRunError, match=f"^{path}: {words}"):
            open_checkpoint(path)
    (adapter / "config.json").write_text((base / "config.json").read_text())  # some tools copy it
    with pytest.raises(GgufRunError, match="is an adapter"):
        open_checkpoint(adapter)


def test_pairs_of_rows(tmp_path: Path) -> None:
    """The first halves of q's and k's heads come between the second ones, as llama.cpp rotates; v stays."""
    tensors = hf_tiny.plain_llama(tmp_path)
    with open_checkpoint(tmp_path) as file:
        for name, n_head in (("q", 4), ("k", 2), ("v", 0)):
            rows = tensors[f"model.layers.0.self_attn.{name}_proj.weight"][1]
            if n_head:
                rows = rows.reshape(n_head, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
            found = file.tensors[f"blk.0.attn_{name}.weight"]
            np.testing.assert_array_equal(found.blocks().view(np.uint16), rows)


def test_gemma3_loses_rows_without_tokens(tmp_path: Path) -> None:
    def longer(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
        kind, bits = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = kind, np.concatenate([bits, bits[:64]])
        config["vocab_size"] = 364

    changed(tmp_path, longer)
    with open_checkpoint(tmp_path) as file:
        n_tokens = len(file.metadata["tokenizer.ggml.tokens"])
        assert file.tensors["token_embd.weight"].ne == (256, n_tokens)


def test_dynamic_rope_scaling_is_left_out(tmp_path: Path) -> None:
    hf_tiny.plain_llama(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.warns(UserWarning, match="dynamic rope scaling, which begins beyond 512 tokens"):
        file = open_checkpoint(tmp_path)
    assert not any("scaling" in key for key in file.metadata)
