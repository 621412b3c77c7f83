"""Chat templates as data: each renders what the named family's published template renders for the
conversations of the tests, in a wording of its own. And a small tokenizer that knows their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim }}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

_CALLS = """\
{%- if m.tool_calls %}
{%- for call in m.tool_calls %}
{{- '\\n' if m.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endif %}"""

_TOOLS = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{{- messages[0].content if messages[0].role == 'system' else DEFAULT }}
{{- '\\n\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- elif DEFAULT %}
{{- '<|im_start|>system\\n' + DEFAULT + '<|im_end|>\\n' }}
{%- endif %}"""

_RESULTS = """\
{%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}
{{- '<|im_start|>user' }}
{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"""

QWEN25 = f"""\
{{%- set DEFAULT = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}}
{_TOOLS}
{{%- for m in messages %}}
{{%- if m.role == 'tool' %}}
{_RESULTS}
{{%- elif m.role != 'system' or not loop.first %}}
{{{{- '<|im_start|>' + m.role + '\\n' + m.content }}}}
{_CALLS}
{{{{- '<|im_end|>\\n' }}}}
{{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{- '<|im_start|>assistant\\n' }}}}{{%- endif %}}"""

QWEN3 = f"""\
{{%- set DEFAULT = '' %}}
{_TOOLS}
{{%- set ns = namespace(query=messages | length - 1, seeking=true) %}}
{{%- for m in messages[::-1] %}}
{{%- if ns.seeking and m.role == 'user' %}}
{{%- set ns.seeking = false %}}
{{%- set ns.query = messages | length - loop.index %}}
{{%- endif %}}
{{%- endfor %}}
{{%- for m in messages %}}
{{%- if m.role == 'tool' %}}
{_RESULTS}
{{%- elif m.role == 'assistant' %}}
{{%- set content = m.content %}}
{{%- set thought = '' %}}
{{%- if m.reasoning_content is string %}}
{{%- set thought = m.reasoning_content %}}
{{%- elif '</think>' in content %}}
{{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}}
{{%- set content = content.split('</think>')[-1].lstrip('\\n') %}}
{{%- endif %}}
{{{{- '<|im_start|>assistant\\n' }}}}
{{%- if loop.index0 > ns.query and (loop.last or thought) %}}
{{{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}}}
{{%- else %}}
{{{{- content }}}}
{{%- endif %}}
{_CALLS}
{{{{- '<|im_end|>\\n' }}}}
{{%- elif m.role == 'user' or not loop.first %}}
{{{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}}}
{{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
{{{{- '<|im_start|>assistant\\n' }}}}
{{%- if enable_thinking is defined and enable_thinking is false %}}
{{{{- '<think>\\n\\n</think>\\n\\n' }}}}
{{%- endif %}}
{{%- endif %}}"""

SMOLLM2 = """\
{%- for m in messages %}
{%- if loop.first and m.role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MISTRAL = """\
{%- set rest = messages %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{%- set rest = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for m in rest if m.role in ('user', 'assistant') and not m.tool_calls %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant/user/assistant') }}
{%- endif %}
{%- endfor %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{%- for m in rest %}
{%- if m.role == 'user' %}
{%- if tools and m == users[-1] %}
{{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- if loop.last and system is defined %}
{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- endif %}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{{- call.function | tojson }}{{- ', ' if not loop.last else ']' + eos_token }}
{%- endfor %}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content | trim + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""

DEEPSEEK_R1 = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{{- '<|User|>' + m.content }}
{%- else %}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""

MARKED = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}
{{- '\\n' }}
{%- else %}{{- m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

PLAIN = """\
{%- for m in messages %}
{{- 'User: ' + m.content + '\\n' if m.role == 'user' else 'Bot:' + m.content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Bot:' }}{%- endif %}"""

SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<|User|>", "<|Assistant|>",
]  # fmt: skip
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
"""Added tokens that a model writes in its answers, as in Qwen's tokenizers."""

TEXT = """Hello there, how are you today? I am fine, thank you, and the answer is forty two.
What is the weather in Paris? It is sunny in Paris, with a light wind from the west.
You are a helpful assistant. The user asks and the assistant answers. user assistant system
Bot: yes. Bot: no. User: why?\n\n\n\nassistant\n\n\nuser\n"""


def make_tokenizer(
    directory: Path, template: str | None = None, more_special: Sequence[str] = ()
) -> Path:
    """A byte-level BPE with merges of words, spaces and newlines, saved as a hub download looks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=True)  # as Llama 3's
    inner.train_from_iterator(
        [TEXT] * 3,
        BpeTrainer(
            vocab_size=500 + len(more_special),
            special_tokens=[*SPECIAL, *more_special],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    inner.add_tokens([AddedToken(token, special=False) for token in NOT_SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


def make_sentencepiece(folder: Path) -> Path:
    """A SentencePiece BPE model trained on the same text."""
    import sentencepiece

    (folder / "text.txt").write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tok"), model_type="bpe",
        vocab_size=330, byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return folder / "tok.model"
