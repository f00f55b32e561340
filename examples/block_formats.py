"""What each block format loses: random weights are quantized and read back. python examples/block_formats.py"""

import numpy as np

from gguf_run.formats import dequantize, quantize

weights = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
print("format  bits per weight  error (RMS, in % of the weights' RMS)")
for name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K"):
    blocks = quantize(weights, name)  # uint8[64, n_bytes]
    error = np.sqrt(((dequantize(blocks, name) - weights) ** 2).mean() / (weights**2).mean())
    print(f"{name:7} {8 * blocks.size / weights.size:15.2f} {error:9.2%}")
