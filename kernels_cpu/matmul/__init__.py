"""Rows times panels. Start with matmul.py; int_tile.py is the inner loop over integers."""
