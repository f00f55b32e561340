"""The numbers of Apertus' activation, rare_ops.Xielu: a file has them for each layer."""

import numpy as np

from gguf_run.formats.errors import FormatError
from gguf_run.models.keys import Keys, show

_MOST = 80.0  # far above any parameter that was trained


def read_xielu(keys: Keys, n_layer: int) -> tuple[tuple[float, ...], ...]:
    """Return alpha_p, alpha_n, beta and eps of each layer.

    The keys have no architecture's name. Each is an array of at least n_layer numbers, or one number for all layers.
    A file has the alphas as they were trained: softplus makes them positive, and beta is added to alpha_n.
    """
    columns = []
    for key in ("xielu.alpha_p", "xielu.alpha_n", "xielu.beta", "xielu.eps"):
        value = keys.metadata.get(key)
        numbers = np.asarray(value if isinstance(value, int | float | np.ndarray) else [], np.float64)
        numbers = np.full(n_layer, numbers) if not numbers.ndim else numbers[:n_layer]
        if numbers.shape != (n_layer,) or not (np.abs(numbers) <= _MOST).all():
            raise FormatError(f"{key} is {show(value)}, must be {n_layer} numbers from -{_MOST:g} to {_MOST:g}")
        columns.append(numbers)
    p, n, beta, eps = columns
    return tuple(zip(*(x.tolist() for x in (np.logaddexp(p, 0), beta + np.logaddexp(n, 0), beta, eps)), strict=True))
