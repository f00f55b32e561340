"""How good a model is: perplexity, KL divergence, choices, importance matrices. It prints nothing."""
