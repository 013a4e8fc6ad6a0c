"""Little chat templates, each with the habits of a family of real ones, and what conversations become with them."""

import functools
import json

from dpo_kernels.data.demo import CHAT_TEMPLATE, demo_tokenizer
from dpo_kernels.data.rendering import ChatTemplate

TURNS = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>", "<start_of_turn>", "<|end|>")
SPECIAL = (*TURNS, "<s>", "</s>", "<|CHATBOT|>", "<|END|>", "<|USER|>", "[TOOL_CALLS]", "<|Assistant|>", "<|User|>")

CHATML = CHAT_TEMPLATE
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

QWEN25 = """\
{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls -%}
<|im_start|>assistant{% if message.content %}{{ '\\n' + message.content }}{% endif %}
{%- for call in message.tool_calls %}{{ '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}<|im_end|>
{% elif message.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Reasoning in a field or in the content; only of turns after the last question. The last turn has a block always.
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content %}{% set reasoning = m.reasoning_content or '' %}
{%- if m.role == 'assistant' and '</think>' in content and not reasoning %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or reasoning) -%}
<think>
{{ reasoning }}
</think>

{% endif -%}
{{ content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

LLAMA3 = """\
{{- '<s><|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif -%}
{{- '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('only supports single tool-calls at once!') }}{% endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + m.tool_calls[0].function.name }}
{{- '", "parameters": ' + m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

LLAMA2 = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- set content = m.content %}
{%- if loop.first and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}{% endif %}
{%- if m.role == 'user' %}{{ '<s>[INST] ' + content | trim + ' [/INST]' }}
{%- else %}{{ ' ' + content | trim + ' </s>' }}{% endif %}
{%- endfor %}"""

# Tools and system text move to the last user turn, wherever that is.
MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
<s>{% for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and m == users[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST] {% if system and m == users[-1] %}{{ system + '\\n\\n' }}{% endif %}{{ m.content }}[/INST]
{%- elif m.tool_calls %}[TOOL_CALLS] [
{%- for c in m.tool_calls %}{{ (c.function | tojson)[:-1] + ', "id": "' + (c.id or '123456789') + '"}' }}
{%- endfor %}]</s>
{%- elif m.role == 'tool' %}[TOOL_RESULTS] {"content": {{ m.content }}}[/TOOL_RESULTS]
{%- else %} {{ m.content }}</s>{% endif %}
{%- endfor %}"""

# As before, but where the last turn is a user's: only in prompts for generation.
MISTRAL_LOOP_LAST = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}
{%- endif -%}
<s>{% for m in messages %}
{%- if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system + '\\n\\n' }}{% endif %}{{ m.content }}[/INST]
{%- else %} {{ m.content }}</s>{% endif %}
{%- endfor %}"""

GEMMA = """\
{{- bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI3 = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# Strips reasoning from finished turns, opens it for generation, and wants arguments as text.
DEEPSEEK = """\
{{- bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.tool_calls %}<|Assistant|>{{ m.content }}<calls>
{%- for c in m.tool_calls %}{{ c.type + '<sep>' + c.function.name + '\\n' + c.function.arguments }}
{%- endfor %}</calls></s>
{%- elif m.role == 'tool' %}<output>{{ m.content }}</output>
{%- elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

ZEPHYR = """\
{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

VICUNA = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}
{%- else %}{{ 'ASSISTANT: ' + m.content + '\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"""

COMMAND_R = """\
{{- bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|USER|>' + m.content.strip() + '<|END|>' }}
{%- elif m.role == 'assistant' %}{{ '<|CHATBOT|>' + m.content.strip() + '<|END|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|CHATBOT|>' }}{% endif %}"""

# Channels: reasoning and calls in one field each, the last turn ends otherwise, tool outputs as JSON text.
GPT_OSS = """\
{%- set ns = namespace(name='') %}{% for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{% set ns.name = m.tool_calls[0].function.name %}
{{- '<|im_start|>assistant to=functions.' + ns.name + '<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson + '<|end|>' }}
{%- elif m.role == 'assistant' %}
{%- if m.thinking and loop.last %}{{ '<|im_start|>assistant<|analysis|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|im_start|>assistant<|final|>' + m.content + ('<|im_end|>' if loop.last else '<|end|>') }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>functions.' + ns.name + '<|message|>' + m.content | tojson + '<|end|>' }}
{%- else %}{{ '<|im_start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"""

# Arguments one by one, and a turn ends where the next begins.
GLM = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|assistant|>
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}
{%- for k, v in c.function.arguments.items() %}<key>{{ k }}</key><value>{{ v if v is string else v | tojson }}</value>
{%- endfor %}</tool_call>{% endfor %}
{%- else %}<|{{ m.role }}|>
{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

REASONING = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}",
)


def chatml(content="{{ message['content'] }}", *, before="", opening=True, skip=None):
    """ChatML with another way to write contents, something before all turns, or without turns of a role."""
    template = CHATML.replace("{{ message['content'] }}", content)
    if skip:
        template = template.replace("in messages %}", f"in messages if message.role != '{skip}' %}}")
    return before + (template if opening is True else template.replace("{% if add_generation_prompt %}", opening))


ALWAYS_OPENS = chatml(opening="{% if true %}")
NEVER_OPENS = chatml(opening="{% if false %}")


@functools.cache
def tokenizer(template=CHATML, **special):
    """The demo's tokenizer with the special tokens of all families, and one of the templates."""
    made = demo_tokenizer(["What is the colour of the sky? It is blue."], 300)
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL), "bos_token": "<s>", **special})
    made.chat_template = template
    return made


# Conversations

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x y"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "sum", "parameters": {"type": "object"}}}
OPEN = "<|im_start|>assistant\n"
ASKED = "<|im_start|>user\nq<|im_end|>\n" + OPEN


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def tool(text):
    return {"role": "tool", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def calling(*calls, text="", **more):
    return assistant(text, tool_calls=list(calls), **more)


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def texts(template, chosen, rejected=None, prompt=None, *, tools=None, train_on="all", **kwargs):
    """What the template makes of a pair: `PairTexts`, or the reason for dropping it."""
    row = {
        "prompt": [user("q")] if prompt is None else prompt,
        "chosen": chosen if isinstance(chosen, list) else [chosen],
        "rejected": rejected or [assistant("bad")],
        "tools": tools,
    }
    kept = json.dumps(row)
    found = ChatTemplate(tokenizer(template), kwargs, train_on).texts(row)
    assert json.dumps(row) == kept  # the data stay as they were
    return found


def labelled(response):
    return [segment.text for segment in response.segments if segment.weight]


def whole(response):
    return "".join(segment.text for segment in response.segments)
