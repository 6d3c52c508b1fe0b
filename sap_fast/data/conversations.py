"""The column layouts of task and safety files, checked and brought into the form of a chat."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sap_fast.data.encoding import Message
from sap_fast.data.files import Row, describe

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """A chat, of which the first `context` messages are read but not scored."""

    messages: list[Message]
    context: int = 0


@dataclass(frozen=True)
class PreferencePair:
    """A safe and a harmful continuation of one prompt."""

    chosen: Conversation
    rejected: Conversation
    rejected_is_opening: bool


def alpaca_prompt(row: Row) -> str:
    """The instruction and, where there is one, a blank line and the input."""
    instruction = row.text("instruction", row.values.get("instruction"))
    context = row.values.get("input")
    if context is None or context == "":
        return instruction
    return f"{instruction}\n\n{row.text('input', context, blank=True)}"


def task_reader(row: Row) -> Callable[[Row], Conversation]:
    """Picks the layout of a task file by the columns of its first row.

    Raises:
        DataError: The columns match no layout.
    """
    filled = {field for field, value in row.values.items() if value is not None}
    for fields, reader in _TASK_LAYOUTS.items():
        if filled.issuperset(fields):
            return reader
    layouts = ", or ".join(" and ".join(map(repr, fields)) for fields in _TASK_LAYOUTS)
    return row.fail(None, describe(row.values), f"the fields {layouts}")


def read_preference_pair(row: Row) -> PreferencePair:
    """Reads a preference row of TRL: `prompt`, `chosen` and `rejected`.

    Each is text or a list of messages. Where `chosen` and `rejected` are message lists and `prompt`
    is not, the messages that both begin with are the prompt, as in TRL.

    Raises:
        DataError: A field is missing or malformed, or both continuations are the same.
    """
    prompt, chosen, rejected = (row.values.get(name) for name in ("prompt", "chosen", "rejected"))
    if chosen == rejected and chosen is not None:
        row.fail("rejected", "the same as in 'chosen'", "a continuation that differs from 'chosen'")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        chosen, rejected = _messages(row, "chosen", chosen), _messages(row, "rejected", rejected)
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == 0:
            row.fail(
                "chosen",
                "no messages that 'rejected' begins with too",
                "the prompt's messages at the start of both, or a list of messages in 'prompt'",
            )
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    opening = row.values.get("rejected_is_opening") or False
    if not isinstance(opening, bool):
        row.fail("rejected_is_opening", describe(opening), "true or false")
    pair = PreferencePair(
        _continued(row, "prompt", prompt, "chosen", chosen),
        _continued(row, "prompt", prompt, "rejected", rejected),
        opening,
    )
    if opening and pair.rejected.messages[-1]["role"] != "assistant":
        row.fail(
            "rejected", "a last message that is not the assistant's", "an opening of an answer"
        )
    return pair


def _read_messages(row: Row) -> Conversation:
    messages = _messages(row, "messages", row.values.get("messages"))
    if messages[0]["role"] == "assistant":
        row.fail("messages[0].role", "'assistant'", "'system' or 'user'")
    if not any(message["role"] == "assistant" for message in messages):
        row.fail("messages", "no message with the role 'assistant'", "at least one answer")
    return Conversation(messages)


def _read_prompt_completion(row: Row) -> Conversation:
    completion = row.values.get("completion")
    return _continued(row, "prompt", row.values.get("prompt"), "completion", completion)


def _read_alpaca(row: Row) -> Conversation:
    prompt = alpaca_prompt(row)
    return _continued(row, "instruction", prompt, "output", row.values.get("output"))


_TASK_LAYOUTS: dict[tuple[str, ...], Callable[[Row], Conversation]] = {
    ("messages",): _read_messages,
    ("prompt", "completion"): _read_prompt_completion,
    ("instruction", "output"): _read_alpaca,
}


def _continued(
    row: Row, prompt_field: str, prompt: Any, answer_field: str, answer: Any
) -> Conversation:
    """A prompt and its continuation, each of them text or a list of messages."""
    if isinstance(prompt, list):
        before = _messages(row, prompt_field, prompt)
        if before[0]["role"] == "assistant":
            row.fail(f"{prompt_field}[0].role", "'assistant'", "'system' or 'user'")
    else:
        before = [{"role": "user", "content": row.text(prompt_field, prompt)}]
    if isinstance(answer, list):
        after = _messages(row, answer_field, answer)
        if after[0]["role"] != "assistant":
            # A continuation that repeats its prompt would be scored behind a doubled prompt.
            row.fail(f"{answer_field}[0].role", repr(after[0]["role"]), "'assistant'")
    else:
        content = row.text(answer_field, answer, blank=True)
        after = [{"role": "assistant", "content": content}]
    return Conversation([*before, *after], context=len(before))


def _messages(row: Row, field: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        row.fail(field, describe(value), "a list of messages")
    messages = []
    for index, message in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(message, dict):
            row.fail(name, describe(message), "an object with 'role' and 'content'")
        role = message.get("role")
        if role not in ROLES:
            unsupported = " (tool calls are not supported)" if role == "tool" else ""
            row.fail(f"{name}.role", describe(role) + unsupported, f"one of {', '.join(ROLES)}")
        content = row.text(f"{name}.content", message.get("content"), blank=True)
        messages.append({"role": role, "content": content})
    return messages
