"""The ops of BERT and its kind: embeddings of positions and types are added, norms stand behind additions."""

import numpy as np

from gguf_run.models import made_weights, rare_ops, step
from gguf_run.models.operands import Buffer
from gguf_run.models.ops import Cache, Experts, Squares, State, Table, Vector, Weight

_NORMS = {"post_attention_norm": "attn_output_norm", "post_ffw_norm": "layer_output_norm"}


class Step(step.Step[Table, Weight, Vector, Cache, Experts, Squares, State]):
    """step.Step of these models."""

    def embed(self) -> None:
        """x = norm(embeddings of the tokens + those of their positions + that of type 0)"""
        super().embed()
        rows = np.zeros((1, self.config.n_embd), np.float32)
        for name, n in (("position_embd", None), ("token_types", 1)):
            if self.load.has(name):
                rows = rows + made_weights.values(self.load, f"{name}.weight").reshape(-1, rows.shape[1])[:n]
        table = made_weights.numbers(self.load, "position_embd.weight", rows)
        self.add(rare_ops.AddPositions(self.x, table, len(rows)))
        self.norm(self.x, self.config.arch.output_norm, self.x)

    def add_product(self, y: Buffer, block: str, name: str, post_norm: str) -> None:
        """x = norm(x + matrix @ y)"""
        self.matmul(y, self.load.matrix(block + name), self.x, residual=self.x)
        self.norm(self.x, block + _NORMS[post_norm], self.x)

    def hidden(self) -> None:
        """result = x: the last layer has normed it"""
        if not self.after:
            self.only_outputs()
        self._result = self.x

    logits = hidden
