"""PEFT adapters made by hand, as peft 0.21 writes them: peft is no dependency of the tests."""

import json
from pathlib import Path
from typing import Any

from quantpack import write_safetensors

CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none", "use_rslora": False, "use_dora": False,
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "base_model_name_or_path": "somebody/model",
}  # fmt: skip


def write_peft(folder: Path, pairs: dict[str, Any], dtype: str = "F32", **config: Any) -> None:
    """pairs: A and B by the name of the module."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    tensors = {
        f"base_model.model.{module}.{end}.weight": (dtype, half)
        for module, halves in pairs.items()
        for end, half in zip(("lora_A", "lora_B"), halves, strict=False)
    }
    write_safetensors(folder / "adapter_model.safetensors", tensors)
