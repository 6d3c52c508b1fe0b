"""Messages, tools and template variables of a row, checked and brought into one form."""

import json
from typing import Any

from sap_fast.data.files import Row, describe
from sap_fast.data.turns import THOUGHT_FIELDS, Message

ROLES = ("system", "developer", "user", "assistant", "tool")

# Which call a tool's answer belongs to stands in the order of the messages too, so templates may
# leave these out.
_LINKS = ("name", "tool_call_id")
_READ_FIELDS = ("role", "content", "tool_calls", "weight", *THOUGHT_FIELDS)


def read_messages(row: Row, field: str, value: Any) -> list[Message]:
    """Reads a list of messages: each an object with `role`, `content` and what a template reads.

    Content in parts of text is joined, and fields that hold nothing are left out.

    Raises:
        DataError: A message is malformed.
        RefusedRow: A message holds what cannot be trained, such as an image.
    """
    if not isinstance(value, list) or not value:
        row.fail(field, describe(value), "a list of messages")
    messages: list[Message] = []
    for index, message in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(message, dict):
            row.fail(name, describe(message), "an object with 'role' and 'content'")
        role = message.get("role")
        if role not in ROLES:
            row.fail(f"{name}.role", describe(role), f"one of {', '.join(ROLES)}")
        if role == "tool" and not (messages and _awaits_tools(messages[-1])):
            row.fail(
                f"{name}.role", "'tool' without tool calls before it", "'tool_calls' to answer"
            )
        messages.append(_read_message(row, name, message))
    return messages


def read_tools(row: Row) -> list[Any]:
    """Reads the column `tools`: a list of JSON schemas, or that list as JSON text.

    Raises:
        DataError: It is something else, or a tool has no name.
    """
    tools = row.values.get("tools")
    if isinstance(tools, str) and tools:
        # Parquet files hold it as text: no one type of column fits the schemas of all tools.
        try:
            tools = json.loads(tools)
        except ValueError as error:
            row.fail("tools", f"invalid JSON ({error})", "a list of JSON schemas")
    if not tools:
        return []
    if not isinstance(tools, list):
        row.fail("tools", describe(tools), "a list of JSON schemas")
    return _named_functions(row, "tools", tools)


def read_template_kwargs(row: Row) -> dict[str, Any]:
    """Reads the column `chat_template_kwargs`: an object of variables for the template.

    Raises:
        DataError: It is something else.
    """
    options = row.values.get("chat_template_kwargs")
    if options is None:
        return {}
    if not isinstance(options, dict):
        row.fail("chat_template_kwargs", describe(options), "an object with the variables")
    return {name: value for name, value in options.items() if value is not None}


def has_content(value: Any) -> bool:
    """Whether a field holds something: neither null nor an empty text, list or object."""
    return value is not None and value not in ("", [], {})


def unknown_fields(message: Message) -> list[str]:
    """Names of the fields of a message that this package does not know, and a template may."""
    links = _LINKS if message["role"] == "tool" else ()
    return [name for name in message if name not in _READ_FIELDS and name not in links]


def _awaits_tools(message: Message) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _read_message(row: Row, name: str, message: dict[str, Any]) -> Message:
    read = {field: value for field, value in message.items() if has_content(value)}
    by_assistant = read["role"] == "assistant"
    if "function_call" in read:
        row.refuse(f"{name}.function_call", "a call in the old form", "'tool_calls'")
    _check_weight(row, name, read, by_assistant)
    if "tool_calls" in read:
        if not by_assistant:
            row.refuse(f"{name}.tool_calls", f"tool calls by {read['role']!r}", "the assistant's")
        read["tool_calls"] = _named_functions(row, f"{name}.tool_calls", read["tool_calls"])
    thoughts = {
        field: row.text(f"{name}.{field}", read[field], blank=True)
        for field in THOUGHT_FIELDS
        if field in read
    }
    if thoughts and not by_assistant:
        row.refuse(f"{name}.{min(thoughts)}", f"a thought of {read['role']!r}", "the assistant's")
    if len(set(thoughts.values())) > 1:
        row.refuse(name, f"thoughts that differ in {', '.join(thoughts)}", "one of them")
    content = message.get("content")
    if content is None and (thoughts or "tool_calls" in read):
        content = ""
    return read | {"content": _read_content(row, f"{name}.content", content)}


def _read_content(row: Row, field: str, content: Any) -> str:
    if not isinstance(content, list) or not content:
        return row.text(field, content, blank=True)
    texts = []
    for index, part in enumerate(content):
        name = f"{field}[{index}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            row.fail(name, describe(part), "an object with 'type' and 'text'")
        if part["type"] != "text":
            row.refuse(f"{name}.type", describe(part["type"]), "'text': nothing else is trained")
        texts.append(row.text(f"{name}.text", part.get("text"), blank=True))
    # Templates that take parts write them one after the other.
    return "".join(texts)


def _check_weight(row: Row, name: str, message: Message, by_assistant: bool) -> None:
    weight = message.get("weight")
    if weight is None or (weight in (0, 1) if by_assistant else weight == 0):
        return
    whose = "" if by_assistant else f" for a turn by {message['role']!r}"
    allowed = "0 (read only) or 1 (trained)" if by_assistant else "0, or none"
    row.refuse(f"{name}.weight", f"{describe(weight)}{whose}", allowed)


def _named_functions(row: Row, field: str, functions: Any) -> list[Any]:
    """Tools or tool calls, each of which names a function."""
    if not isinstance(functions, list):
        row.fail(field, describe(functions), "a list of objects with 'function'")
    if row.path.suffix.lower() == ".parquet":
        functions = _without_nulls(functions)
    for index, function in enumerate(functions):
        named = function.get("function", function) if isinstance(function, dict) else None
        if not isinstance(named, dict) or not isinstance(named.get("name"), str):
            row.fail(f"{field}[{index}]", describe(function), "an object with a function's name")
    return functions


def _without_nulls(value: Any) -> Any:
    """The value without the fields that Parquet adds: it gives every object those of all."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
