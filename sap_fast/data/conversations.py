"""The column layouts of task and safety files, checked and brought into the form of a chat."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sap_fast.data.files import Row, describe
from sap_fast.data.messages import (
    has_content,
    read_messages,
    read_template_kwargs,
    read_tools,
)
from sap_fast.data.turns import Message

_FOR_ALL = ("system", "tools", "chat_template_kwargs")
SAFETY_COLUMNS = frozenset(
    {"prompt", "chosen", "rejected", "rejected_is_opening", "history"}
).union(_FOR_ALL)
"""The columns of a preference row that are read."""


@dataclass(frozen=True)
class Conversation:
    """A chat, of which the first `context` messages are read but not scored.

    Attributes:
        messages: The chat.
        context: Number of leading messages that are only read.
        tools: JSON schemas of the tools that it may call.
        template_kwargs: Further variables for the chat template.
    """

    messages: list[Message]
    context: int = 0
    tools: list[Any] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreferencePair:
    """A safe and a harmful continuation of one prompt."""

    chosen: Conversation
    rejected: Conversation
    rejected_is_opening: bool


class TaskLayout(NamedTuple):
    """A layout of task rows: the columns that tell it, all that it reads, and its reader."""

    fields: tuple[str, ...]
    columns: frozenset[str]
    read: Callable[[Row], Conversation]


def alpaca_prompt(row: Row) -> str:
    """The instruction and, where there is one, a blank line and the input."""
    instruction = row.text("instruction", row.values.get("instruction"))
    context = row.values.get("input")
    if context is None or context == "":
        return instruction
    return f"{instruction}\n\n{row.text('input', context, blank=True)}"


def task_layout(row: Row) -> TaskLayout:
    """Picks the layout of a task file by the columns of its first row.

    Raises:
        DataError: The columns match no layout.
    """
    filled = {name for name, value in row.values.items() if value is not None}
    for layout in _TASK_LAYOUTS:
        if filled.issuperset(layout.fields):
            return layout
    layouts = ", or ".join(" and ".join(map(repr, layout.fields)) for layout in _TASK_LAYOUTS)
    return row.fail(None, describe(row.values), f"the fields {layouts}")


def read_preference_pair(row: Row) -> PreferencePair:
    """Reads a preference row of TRL: `prompt`, `chosen` and `rejected`.

    Each is text or a list of messages. Where `chosen` and `rejected` are message lists and `prompt`
    is not, the messages that both begin with are the prompt, as in TRL.

    Raises:
        DataError: A field is missing or malformed, or both continuations are the same.
        RefusedRow: A field holds what cannot be trained.
    """
    prompt, chosen, rejected = (row.values.get(name) for name in ("prompt", "chosen", "rejected"))
    if chosen == rejected and chosen is not None:
        row.fail("rejected", "the same as in 'chosen'", "a continuation that differs from 'chosen'")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(prompt, list):
        chosen, rejected = (
            read_messages(row, "chosen", chosen),
            read_messages(row, "rejected", rejected),
        )
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
    messages = read_messages(row, "messages", row.values.get("messages"))
    if messages[0]["role"] == "assistant":
        row.fail("messages[0].role", "'assistant'", "'system' or 'user'")
    if not any(message["role"] == "assistant" for message in messages):
        row.fail("messages", "no message with the role 'assistant'", "at least one answer")
    return _conversation(row, messages, context=0)


def _read_prompt_completion(row: Row) -> Conversation:
    completion = row.values.get("completion")
    return _continued(row, "prompt", row.values.get("prompt"), "completion", completion)


def _read_alpaca(row: Row) -> Conversation:
    prompt, output = alpaca_prompt(row), row.values.get("output")
    # LLaMA-Factory, from where the column `history` comes, trains its answers too.
    return _continued(row, "instruction", prompt, "output", output, history_is_scored=True)


_TASK_LAYOUTS = tuple(
    TaskLayout(fields, frozenset({*fields, *more, *_FOR_ALL}), read)
    for fields, more, read in (
        (("messages",), (), _read_messages),
        (("prompt", "completion"), ("history",), _read_prompt_completion),
        (("instruction", "output"), ("input", "history"), _read_alpaca),
    )
)


def _continued(
    row: Row,
    prompt_field: str,
    prompt: Any,
    answer_field: str,
    answer: Any,
    *,
    history_is_scored: bool = False,
) -> Conversation:
    """A prompt and its continuation, each of them text or a list of messages."""
    history = _read_history(row)
    if isinstance(prompt, list):
        if history:
            row.refuse("history", f"turns beside the messages in {prompt_field!r}", "one of them")
        before = read_messages(row, prompt_field, prompt)
        if before[0]["role"] == "assistant":
            row.fail(f"{prompt_field}[0].role", "'assistant'", "'system' or 'user'")
    else:
        before = [*history, {"role": "user", "content": row.text(prompt_field, prompt)}]
    if isinstance(answer, list):
        after = read_messages(row, answer_field, answer)
        if after[0]["role"] != "assistant":
            # A continuation that repeats its prompt would be scored behind a doubled prompt.
            row.fail(f"{answer_field}[0].role", repr(after[0]["role"]), "'assistant'")
    else:
        content = row.text(answer_field, answer, blank=True)
        after = [{"role": "assistant", "content": content}]
    context = 0 if history_is_scored else len(before)
    return _conversation(row, [*before, *after], context)


def _conversation(row: Row, messages: list[Message], context: int) -> Conversation:
    """The chat with what other columns say about it."""
    system = row.values.get("system")
    if has_content(system):
        if messages[0]["role"] in ("system", "developer"):
            row.refuse("system", f"text beside a message by {messages[0]['role']!r}", "one of them")
        messages = [{"role": "system", "content": row.text("system", system)}, *messages]
        context += context > 0
    return Conversation(messages, context, read_tools(row), read_template_kwargs(row))


def _read_history(row: Row) -> list[Message]:
    """The column `history` of LLaMA-Factory: earlier turns, each a question and its answer."""
    history = row.values.get("history")
    if not has_content(history):
        return []
    expected = "a list of pairs: a question and its answer"
    if not isinstance(history, list):
        row.fail("history", describe(history), expected)
    messages: list[Message] = []
    for index, pair in enumerate(history):
        name = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            row.fail(name, describe(pair), expected)
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": row.text(name, text)})
    return messages
