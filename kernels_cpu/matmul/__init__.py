"""Rows times panels. Start with tile.py, the innermost kernel, then matmul.py, an op. moe.py has the ops of experts."""
