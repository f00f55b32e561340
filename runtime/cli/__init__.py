"""The commands, one file each; nothing outside this folder imports it. Start with run.py, which is gguf-run.

Commands share common.py (errors, help, version), load_options.py and sampling_options.py (options), complete.py (their
values in a shell) and answer.py. They do not import each other.
"""
