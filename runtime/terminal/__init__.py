"""What people see at a terminal: text.py (lines, tables, sizes, colours), progress.py (the bar).

It is the ground floor of runtime: no room above it prints in a way of its own.
"""
