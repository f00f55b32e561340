"""What people see at a terminal: text.py (lines, tables, sizes), progress.py (the bar), colours.py.

It is the ground floor of runtime: no room above it prints in a way of its own.
"""
