"""A step as a tape of compiled functions, and the threads that run it. Start with op.py, then team.py."""
