"""The numbers of Apertus' activation, ops.Xielu: a file has them for each layer."""

import math

import numpy as np

from gguf_run.formats.errors import FormatError
from gguf_run.models.keys import Keys, show

_MOST = 80.0  # the greatest parameter: softplus of it is itself, and far above any that was trained


def read_xielu(keys: Keys, n_layer: int) -> tuple[tuple[float, float, float, float], ...]:
    """Return alpha_p, alpha_n, beta and eps of each layer.

    The keys have no architecture's name. Each is an array of at least n_layer numbers, or one number for all layers.
    A file has alpha_p and alpha_n as they were trained: softplus makes them positive, and beta is added to alpha_n.
    """
    columns = []
    for key in ("xielu.alpha_p", "xielu.alpha_n", "xielu.beta", "xielu.eps"):
        value = keys.metadata.get(key)
        numbers = np.asarray(value if isinstance(value, int | float | np.ndarray) else [], np.float64)
        numbers = np.full(n_layer, numbers) if not numbers.ndim else numbers[:n_layer]
        if numbers.shape != (n_layer,) or not (np.abs(numbers) <= _MOST).all():
            raise FormatError(f"{key} is {show(value)}, must be {n_layer} numbers from -{_MOST:g} to {_MOST:g}")
        columns.append(numbers.tolist())
    rows = zip(*columns, strict=True)
    return tuple((math.log1p(math.exp(p)), beta + math.log1p(math.exp(n)), beta, eps) for p, n, beta, eps in rows)
