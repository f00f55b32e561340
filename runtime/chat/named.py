"""Chat templates by name (--chat-template NAME), for models whose files carry no template.

The names and the prompts for system, user and assistant messages are llama.cpp's. The tokenizer adds BOS.
"""

from gguf_run.formats.errors import GgufRunError
from gguf_run.formats.gguf.mapped import read_bytes
from gguf_run.runtime.chat.template import MAX_TEMPLATE

_EACH = "{% for m in messages %}"
_ANSWER = "{% endfor %}{% if add_generation_prompt %}"
_END = "{% endif %}"
_SYSTEM_FIRST = "{% set s = (messages[0].content | trim) if messages[0].role == 'system' else none %}"

TEMPLATES = {
    "chatml": (
        _EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + _ANSWER + "<|im_start|>assistant\n" + _END
    ),
    "llama3": (
        _EACH + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        + _ANSWER + "<|start_header_id|>assistant<|end_header_id|>\n\n" + _END
    ),
    "gemma": (
        _SYSTEM_FIRST + "{% for m in messages if m.role != 'system' %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{% if loop.first and s %}{{ s ~ '\n\n' }}{% endif %}"
        "{{ m.content | trim }}<end_of_turn>\n" + _ANSWER + "<start_of_turn>model\n" + _END
    ),
    "phi3": _EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + _ANSWER + "<|assistant|>\n" + _END,
    "zephyr": _EACH + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n" + _ANSWER + "<|assistant|>\n" + _END,
    "vicuna": (
        _EACH + "{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}USER: {{ m.content }}\n"
        "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}\n{% endif %}" + _ANSWER + "ASSISTANT:" + _END
    ),
}  # fmt: skip


def find_template(name: str) -> str:
    """Return the text of a template: one of TEMPLATES by its name, or the content of a file.

    GgufRunError if `name` is neither, or the file is too large, a device, or not UTF-8 text.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        return read_bytes(name, 4 * MAX_TEMPLATE).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        known = ", ".join(TEMPLATES)
        reason = f"neither a file nor one of {known}: name the file of a Jinja template"
        raise GgufRunError(f"--chat-template {name}: {reason}") from None
    except UnicodeDecodeError:
        raise GgufRunError(f"--chat-template {name}: not UTF-8 text: name the file of a Jinja template") from None
