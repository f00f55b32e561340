"""Training a GGUF model on the machine that runs it. Start with model.py.

model.py runs the lists of ops that inference runs; ops.py has their functions in torch.
"""
