"""The commands, one file each; nothing outside this folder imports it. Start with run.py, which is gguf-run.

Commands share common.py (errors, version), options.py, complete.py (values of options in a shell), help.py,
conversation.py (sessions and answers) and the files *_report.py. Commands do not import each other.
"""
