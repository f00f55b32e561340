"""The commands, one file each; nothing outside this folder imports it. Start with run.py, which is gguf-run.

Commands share common.py (errors, version), load_options.py and sampling_options.py (options), complete.py (values of
options in a shell), help.py, and the files named after what they show. Commands do not import each other.
"""
