"""Several prompts together: each step reads the weights once for all of them. python examples/batch.py [MODEL]"""

import sys

from gguf_run import Model

PROMPTS = [f"The word {word} means" for word in ("river", "lantern", "winter", "compass")]

with Model.load(sys.argv[1] if sys.argv[1:] else None, n_ctx=256, n_seq=len(PROMPTS)) as model:
    answers = model.generate_batch(PROMPTS, max_tokens=24, temperature=0)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"{prompt}{answer.text}\n")
