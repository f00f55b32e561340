"""Training a GGUF model on the machine that runs it: `lora`, `qat` and `distill`, with torch. Start with model.py.

model.py runs the lists of ops that inference runs; ops.py has their functions in torch. loop.py has the steps,
low_rank.py adapters, student.py and grids.py weights for a quantized file.
"""

from gguf_run.runtime.train.loop import TrainOptions as TrainOptions
from gguf_run.runtime.train.low_rank import LoraOptions as LoraOptions
from gguf_run.runtime.train.low_rank import lora as lora
from gguf_run.runtime.train.student import distill as distill
from gguf_run.runtime.train.student import qat as qat
