"""gguf-quantize --target-size: what each tensor costs is measured or read, then types are chosen."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.formats.gguf.reader import GGUFFile
from gguf_run.runtime.cli.byte_size import byte_size
from gguf_run.runtime.terminal.progress import progress
from gguf_run.runtime.terminal.text import message
from gguf_run.runtime.terminal.text_input import read_text

if TYPE_CHECKING:
    from gguf_run.runtime.quantize.plan import Plan


def choose(file: GGUFFile, plan: "Plan", n_threads: int, given: Mapping[str, Any]) -> "Plan":
    """Return the plan with the types that fit into --target-size or --target-bpw. given: the options."""
    from gguf_run.runtime.quantize.allocate import allocate, check_size, size_at

    bits, size = given["target_bpw"], byte_size(given["target_size"], "--target-size")
    size = size_at(plan, bits) if bits else size
    check_size(plan, size)
    plan, kl = allocate(plan, _costs(file, plan, n_threads, given), size, n_threads)
    message(f"note: the KL divergence to the original should be about {kl:.3g}")
    return plan


def _costs(file: GGUFFile, plan: "Plan", n_threads: int, given: Mapping[str, Any]) -> Mapping[str, float]:
    from gguf_run.runtime.evaluate.sensitivity import Sensitivity, probe
    from gguf_run.runtime.quantize.allocate import is_place

    path, text = given["sensitivity"], read_text(given["probe"]) if given["probe"] else None
    known = new = Sensitivity.of(file, plan, text)
    if path is not None and path.exists():
        known = known.with_file(path)
    todo = [item for item in plan.items if is_place(item) and item.source.name not in known.tensors]
    if todo and text is None:
        missing = f"what {len(todo)} tensors cost the model is not known"
        raise OptionError(f"{missing}: give --probe TEXT, or a --sensitivity FILE that has them")
    if todo and known.text != new.text:
        raise GgufRunError(f"{path}: was made with another text than {given['probe']}: name that one or another file")
    if not todo or text is None:
        return known.tensors
    with progress("probing", "tensors") as bar:
        for n, (name, cost) in enumerate(probe(file, plan, todo, text, n_threads)):
            known = replace(known, tensors={**known.tensors, name: cost})
            if path is not None:
                known.write(path)
            if n == 0:  # kernels are compiled now
                start = time.monotonic()
            elif n == 3:
                minutes = (time.monotonic() - start) / n * (len(todo) - n - 1) / 60
                bar.message(f"probing {len(todo)} tensors takes about {minutes:.0f} minutes")
            bar.set(n + 1, len(todo))
    return known.tensors
