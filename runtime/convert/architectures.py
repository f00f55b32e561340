"""How the architectures of Hugging Face checkpoints differ, as data: one row each, see layout.py."""

from collections.abc import Mapping

from gguf_run.runtime.convert.layout import CheckpointLayout
from gguf_run.runtime.convert.layouts import delta_net, dense, encoders, gemma, hybrid, latent, mixtures

_FAMILIES = delta_net, dense, encoders, gemma, hybrid, latent, mixtures
_ROWS: tuple[CheckpointLayout, ...] = tuple(row for family in _FAMILIES for row in family.ROWS)
BY_CLASS: Mapping[str, CheckpointLayout] = {name: row for row in _ROWS for name in row.classes}
BY_MODEL_TYPE: Mapping[str, CheckpointLayout] = {name: row for row in _ROWS for name in row.classes.values()}
BY_ARCH: Mapping[str, tuple[CheckpointLayout, ...]] = {
    row.arch: tuple(other for other in _ROWS if other.arch == row.arch) for row in _ROWS
}
