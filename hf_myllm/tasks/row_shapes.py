"""The shapes of rows that data sets for instruction tuning have, each made a chat or a prompt with its completion."""

import json
from contextlib import suppress

from ..data.columns import BadRowError, read_text

# The columns of all shapes; `system` and `history` belong to ShareGPT and Alpaca.
COLUMNS = (
    *("messages", "prompt", "completion", "conversations", "conversation"),
    *("instruction", "input", "output", "system", "history", "tools", "documents"),
)
ROLES = ("system", "user", "assistant", "tool")
_SYNONYMS = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "bard", "bing"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    "developer": "system",
}
_ALPACA = ("### Instruction:\n{}\n\n", "### Input:\n{}\n\n", "### Response:\n")  # without a chat template


def read_shape(record, where, template):
    """Return (shape, row): what a record looks like, in words; and a dict of its prompt and completion, or of its
    messages and, where the first ones are the prompt, their number as num_prompt_turns.

    Args:
        record: a dict of columns.
        template: the tokenizer's chat template, or "".
    Raises:
        BadRowError: the record has no known shape, or a turn has no role or content that can be used.
    """
    present = {name for name, value in record.items() if value is not None}
    for column in ("messages", "conversations", "conversation"):
        if column in present:
            turns = _check_turns(record[column], where, column)
            is_sharegpt = bool(turns) and "role" not in turns[0] and "from" in turns[0]
            shape = "ShareGPT (turns of from and value)" if is_sharegpt else "chats (turns of role and content)"
            return shape, {"messages": _with_system(record, _read_turns(turns, where, template))}
    if {"prompt", "completion"} <= set(record):
        row = {name: record[name] for name in ("prompt", "completion")}
        if isinstance(row["prompt"], list):
            turns = [_read_turns(_check_turns(row[name], where, name), where, template) for name in row]
            row = {"messages": turns[0] + turns[1], "num_prompt_turns": len(turns[0])}
        return "prompts with completions", row
    if {"instruction", "output"} <= present:
        return "Alpaca (instruction, input, output)", _read_alpaca(record, where, template)
    raise BadRowError(
        f"{where} has neither messages, conversations, prompt and completion, nor instruction and output, but "
        f"{', '.join(map(repr, record))}; name its columns, for example --columns '{{prompt: question, completion: "
        "answer}'"
    )


def _check_turns(turns, where, column):
    if isinstance(turns, str):  # as JSON, where a file's format has no lists
        with suppress(ValueError):
            turns = json.loads(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError(f"{where}: {column} is not a list of turns, each with role and content: {turns!r:.80}")
    return turns


def _read_turns(turns, where, template):
    return [read_turn(turn, f"{where}, turn {number}", template) for number, turn in enumerate(turns, start=1)]


def _with_system(record, turns):
    """Return the turns with the record's `system` text in front, unless they begin with one."""
    system = record.get("system")
    if isinstance(system, str) and system.strip() and (not turns or turns[0]["role"] != "system"):
        return [{"role": "system", "content": system}, *turns]
    return turns


def read_turn(turn, where, template):
    """Return a turn of a chat with role and content as text, whatever its keys and roles are called.

    Raises:
        BadRowError: the role is unknown, or the content is not text.
    """
    turn = {name: value for name, value in turn.items() if value is not None}  # Arrow fills in None
    for name, other in (("role", "from"), ("content", "value")):
        if name not in turn and other in turn:
            turn[name] = turn.pop(other)
    if turn.get("role") == "function_call":  # ShareGPT's turn of the assistant, the call as JSON
        turn |= {"role": "assistant"} | _read_function_call(turn.get("content"), template)
    if turn.get("tool_calls"):
        calls = turn["tool_calls"] if isinstance(turn["tool_calls"], list) else [turn["tool_calls"]]
        turn["tool_calls"] = [_read_tool_call(call, where) for call in calls]
        turn.setdefault("content", "")
    if isinstance(turn.get("content"), list):
        turn["content"] = "".join(_read_part(part, where) for part in turn["content"])
    for name in ("role", "content"):
        if not isinstance(turn.get(name), str):
            raise BadRowError(f"{where} has no {name} of text: {turn!r:.80}")
    turn["role"] = _read_role(turn["role"], where, template)
    return turn


def _read_role(role, where, template):
    if role in ROLES:
        return role
    meaning = _SYNONYMS.get(role.lower(), role.lower())
    if meaning in ("user", "assistant"):
        return meaning
    if f"'{role}'" in template or f'"{role}"' in template:  # the template has a form of its own for it
        return role
    if meaning not in ROLES:
        raise BadRowError(f"{where}: the role {role!r:.40} is unknown; use {', '.join(ROLES)}")
    return meaning


def _read_part(part, where):
    """Return the text of one part of a content that is a list."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRowError(f"{where} has a part of type {kind!r:.40}; only text can be trained on")
    return part["text"]


def _read_tool_call(call, where):
    """Return a tool call whose arguments are an object: OpenAI has them as JSON text, which templates would quote."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadRowError(f"{where}: a tool call is no object with a function: {call!r:.80}")
    if isinstance(arguments := function.get("arguments"), str):
        try:
            function = function | {"arguments": json.loads(arguments or "{}")}
        except ValueError:
            raise BadRowError(f"{where}: the arguments of a tool call are not JSON: {arguments!r:.80}") from None
    return call | {"function": function} if "function" in call else function


def _read_function_call(content, template):
    """Return the keys of a turn that calls a function given as JSON text: as a tool call if the template has them."""
    if "tool_calls" in template and isinstance(content, str):
        try:
            call = json.loads(content)
        except ValueError:
            return {}
        calls = call if isinstance(call, list) else [call]
        if all(isinstance(call, dict) and "name" in call for call in calls):
            return {"content": "", "tool_calls": calls}
    return {}


def _read_alpaca(record, where, template):
    """Return the messages of an instruction with an input and an output; without a chat template, as text."""
    instruction, output = (read_text(record, where, name) for name in ("instruction", "output"))
    extra = read_text(record, where, "input") if record.get("input") else ""
    if not output:
        raise BadRowError(f"{where} has no output")
    extra = extra if extra.strip() else ""
    if template or record.get("history") or record.get("system"):
        turns = []
        for turn in record.get("history") or []:
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
                raise BadRowError(f"{where}: history is not a list of pairs of texts: {turn!r:.80}")
            turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        turns += [{"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}]
        return {"messages": _with_system(record, [*turns, {"role": "assistant", "content": output}])}
    head, middle, end = _ALPACA
    return {"prompt": head.format(instruction) + (middle.format(extra) if extra else "") + end, "completion": output}
