"""Renders fresh random conversations with transformers: `render.py SEED OUT TEMPLATE...` writes a list of cases."""

import json
import random
import sys
from pathlib import Path

from transformers.utils import chat_template_utils as hf

PIECES = ["two words", " lead", "trail \n", "\n\n", "a\"b\\c", "caf\u00e9 \u6f22\u5b57 \U0001f600", "1 < 2 & 3 > 2"]
PIECES += ["<think>\nhm\n</think>\n\nso", "'quoted'", "{% raw %}", "{{ x }}", "\t\u00a0\u2003", "</think>", "", "x" * 50]
PIECES += ["\u001c", "\u0085", "<tool_response>ok</tool_response>"]
NUMBERS = [2**63, 1e16, 5e-324, 0.1]
NAMES = ["get_weather", "f", "lookup\"it"]
ROLES = ["system", "user", "assistant", "tool"]


def text(rng):
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 5)))


def value(rng, depth=0):
    drawn = [rng.randrange(-5, 10**12), rng.random() * 10.0 ** rng.randrange(-9, 20), text(rng)]
    simple = [None, True, False, *drawn, *NUMBERS]
    if depth < 2 and rng.random() < 0.3:
        if rng.random() < 0.5:
            return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
        return {text(rng)[:5] + str(i): value(rng, depth + 1) for i in range(rng.randrange(3))}
    return rng.choice(simple)


def call(rng, wrapped):
    function = {"name": rng.choice(NAMES), "arguments": {f"k{i}": value(rng) for i in range(rng.randrange(3))}}
    return {"type": "function", "id": "call12345", "function": function} if wrapped else function


def conversation(rng):
    messages, wrapped = [], rng.random() < 0.8
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": text(rng)})
    for _ in range(rng.randrange(1, 4)):
        if rng.random() < 0.1:
            messages.append({"role": rng.choice(ROLES), "content": text(rng)})
        # A template that cannot read parts prints the list, and of lists only ASCII is promised.
        content = [{"type": "text", "text": rng.choice(PIECES[:5])}] if rng.random() < 0.1 else text(rng)
        messages.append({"role": "user", "content": content})
        if rng.random() < 0.3:
            calls = [call(rng, wrapped) for _ in range(rng.choice([1, 1, 2]))]
            message = {"role": "assistant", "tool_calls": calls}
            if rng.random() < 0.7:
                message["content"] = rng.choice(["", text(rng), None])
            messages.append(message)
            for each in calls:
                messages.append({"role": "tool", "content": text(rng), "name": "f", "tool_call_id": "call12345"})
        answer = {"role": "assistant", "content": text(rng)}
        if rng.random() < 0.3:
            answer["reasoning_content"] = text(rng)
        messages.append(answer)
    if rng.random() < 0.3:
        messages.append({"role": "user", "content": text(rng)})
    return messages


def tool(rng):
    properties = {f"p{i}": {"type": rng.choice(["string", "number"]), "description": text(rng)} for i in range(2)}
    parameters = {"type": "object", "properties": properties, "required": ["p0"]}
    function = {"name": rng.choice(NAMES), "description": text(rng), "parameters": parameters}
    return {"type": "function", "function": function}


def render(template, case):
    compiled = hf._compile_jinja_template(template)
    try:
        return hf._render_with_assistant_indices(
            compiled, case["messages"], case["tools"], None, case["add_generation_prompt"], **case["variables"]
        )
    except Exception as error:
        raised = type(error).__name__ == "TemplateError"
        return None, {"kind": type(error).__name__, "message": str(error), "raised": raised}


def main():
    seed, out, templates = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rng, cases = random.Random(seed), []
    for path in templates:
        template = Path(path).read_text()
        for _ in range(25):
            case = {"template": path, "messages": conversation(rng)}
            case["variables"] = {"bos_token": "<s>", "eos_token": "</s>"}
            case["tools"] = [tool(rng) for _ in range(rng.randrange(1, 3))] if rng.random() < 0.3 else None
            case["add_generation_prompt"] = rng.random() < 0.5
            if rng.random() < 0.3:
                case["variables"]["enable_thinking"] = rng.random() < 0.5
            text, found = render(template, case)
            cases.append(case | {"text": text, "error" if text is None else "spans": found})
    Path(out).write_text(json.dumps(cases))


main()
