"""A conversation of two turns, printed as it comes: python examples/chat.py [MODEL]

The second turn computes only what is new: the first one stands in the KV cache already.
"""

import sys

from gguf_run import Model

QUESTIONS = ("Name the largest planet.", "How many moons does it have?")

with Model.load(sys.argv[1] if sys.argv[1:] else None, n_ctx=1024) as model:
    messages = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        print(f"> {question}")
        answer = ""
        for text in model.chat(messages, temperature=0, max_tokens=60):
            print(text, end="", flush=True)
            answer += text
        messages.append({"role": "assistant", "content": answer})
        print(f"\n({model.stats.n_reused} tokens of the prompt were known)")
