"""An answer that can only be yes or no, and how sure the model is: python examples/yes_or_no.py [MODEL]

A logits processor sees the logits before all samplers and may change them.
"""

import math
import sys

import numpy as np

from gguf_run import Model

QUESTIONS = ("Is Paris in France?", "Is the Moon larger than the Sun?")

with Model.load(sys.argv[1] if sys.argv[1:] else None, n_ctx=512) as model:
    allowed = [model.tokenize(word, add_special=False)[0] for word in ("Yes", "No")]

    def only_allowed(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        masked = np.full_like(logits, -np.inf)
        masked[allowed] = logits[allowed]
        return masked

    for question in QUESTIONS:
        messages = [{"role": "user", "content": f"{question} Answer Yes or No."}]
        options = {"max_tokens": 1, "temperature": 0, "logits_processors": [only_allowed], "logprobs": 1}
        answer = model.chat(messages, **options).answer()
        print(f"{question} {answer.text} (the model gave it {math.exp(answer.logprobs[0].logprob):.0%})")
