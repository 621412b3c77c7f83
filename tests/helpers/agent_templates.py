"""Look-alikes of the chat templates of models that think and call tools, in a wording of their own:
what each reads, drops, refuses and ends a turn with is as in the named family's published one.
"""

from __future__ import annotations

LLAMA31 = """\
{%- macro head(role) %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- endmacro %}
{{- bos_token }}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- endif %}
{{- head('system') + 'Cutting Knowledge Date: December 2023\\n\\n' }}
{%- if tools %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for m in messages %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{%- set call = m.tool_calls[0].function %}
{{- head('assistant') + '{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{- head('ipython') }}{{- m.content | tojson }}{{- '<|eot_id|>' }}
{%- else %}{{- head(m.role) + m.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{%- endif %}"""

GLM45 = """\
{%- if tools %}{{- '<|system|>\\n# Tools\\n' }}{{- tools | tojson }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|assistant|>' }}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{{- '\\n<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' }}
{%- if m.content.strip() %}{{- '\\n' + m.content.strip() }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}
{{- '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' }}
{{- value if value is string else value | tojson }}{{- '</arg_value>' }}
{%- endfor %}
{{- '\\n</tool_call>' }}
{%- endfor %}
{%- elif m.role == 'tool' %}
{%- if loop.previtem.role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- else %}{{- '<|' + m.role + '|>\\n' + m.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

DEEPSEEK31 = """\
{{- bos_token }}
{%- if not thinking is defined %}{%- set thinking = false %}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{{- '<|User|>' + m.content }}
{%- elif m.role == 'tool' %}{{- '<|output|>' + m.content + '<|/output|>' }}
{%- else %}
{%- if loop.previtem.role == 'user' %}{{- '<|Assistant|></think>' }}{%- endif %}
{%- if m['tool_calls'] is defined and m['tool_calls'] is not none %}
{{- m.content + '<|calls|>' }}
{%- for call in m.tool_calls %}
{{- call['function']['name'] + '<|sep|>' + call['function']['arguments'] }}
{%- endfor %}
{{- '<|/calls|>' + eos_token }}
{%- else %}{{- m.content.split('</think>')[-1] + eos_token }}
{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}
{{- '<|Assistant|>' + ('<think>' if thinking else '</think>') }}
{%- endif %}"""

GPT_OSS = """\
{{- '<|start|>system<|message|>You are ChatGPT.<|end|>' }}
{%- if messages[0].role == 'developer' or messages[0].role == 'system' %}
{{- '<|start|>developer<|message|># Instructions\\n\\n' + messages[0].content }}
{%- if tools %}{{- '\\n# Tools\\n' }}{{- tools | tojson }}{%- endif %}{{- '<|end|>' }}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if 'tool_calls' in m %}
{%- if m.content and m.thinking %}{{- raise_exception('both content and thinking') }}{%- endif %}
{%- if m.thinking or m.content %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.thinking or m.content) + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name }}
{{- '<|channel|>commentary json<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson }}{{- '<|call|>' }}
{%- elif loop.last and not add_generation_prompt %}
{%- if 'thinking' in m %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' }}
{{- m.content | tojson }}{{- '<|end|>' }}
{%- elif m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

KIMI_K2 = """\
{%- if tools %}
{{- '<|im_system|>tool_declare<|im_middle|>' }}{{- tools | tojson }}{{- '<|im_end|>' }}
{%- endif %}
{%- set ns = namespace(said=-1) %}
{%- for m in messages %}
{%- if m.role == 'assistant' and not m.get('tool_calls') %}
{%- set ns.said = loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_assistant|>assistant<|im_middle|><think>' }}
{{- m.get('reasoning_content', '') if loop.index0 > ns.said else '' }}{{- '</think>' + m.content }}
{%- if m.get('tool_calls') %}
{{- '<|calls|>' }}
{%- for call in m.tool_calls %}
{%- set arguments = call.function.arguments %}
{{- '<|call_begin|>' + (call['id'] or '') + '<|sep|>' }}
{{- arguments if arguments is string else arguments | tojson }}{{- '<|call_end|>' }}
{%- endfor %}
{{- '<|/calls|>' }}
{%- endif %}
{%- elif m.role == 'tool' %}
{{- '<|im_system|>tool<|im_middle|>## Return of ' + m.tool_call_id + '\\n' + m.content }}
{%- else %}{{- '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content }}
{%- endif %}
{{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}"""

PARTS = """\
{%- for m in messages %}
{{- '[INST]' + m.content + '[/INST]' if m.role == 'user' else '' }}
{%- if m.role == 'assistant' %}
{%- if m.content is string %}{{- m.content }}
{%- else %}
{%- for part in m.content %}
{{- '<think>' + part.thinking + '</think>' if part.type == 'thinking' else part.text }}
{%- endfor %}
{%- endif %}
{{- eos_token }}
{%- endif %}
{%- endfor %}"""
"""Thinking as a part of the content, as Magistral's template reads it."""

SPECIAL = [
    "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "<|endoftext|>",
    "<|calls|>", "<|/calls|>", "<|sep|>", "<|output|>", "<|/output|>", "<|call_begin|>",
    "<|call_end|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>",
    "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
]  # fmt: skip
GLM_ENDS = ["<|endoftext|>", "<|user|>", "<|observation|>"]
