"""Messages to a prompt, by the model's own template. Start with template.py."""
