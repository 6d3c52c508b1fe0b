"""One turn of a chat: its fields, its thought, and markers in their place."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""One turn of a chat: `role`, `content`, and what else a template reads, as in transformers."""

THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""The names under which templates and data know a thought; this package uses the first."""
THOUGHT = THOUGHT_FIELDS[0]


class ChatTemplateError(ValueError):
    """A chat template that cannot render a chat, or not so that its answers can be found."""


@dataclass
class Markers:
    """Text that stands in for fields, to see where they come out.

    Attributes:
        fields: What each marker stands for, in words.
    """

    fields: dict[str, str] = field(default_factory=dict)

    def mark(self, what: str) -> str:
        """Returns a marker to put in the place of `what`."""
        # Plain ASCII, so that no template escapes it.
        marker = f"SapFast{len(self.fields)}Marker"
        self.fields[marker] = what
        return marker

    def in_tool(self, tool: Any) -> Any:
        """Returns a tool with a marker for its name."""
        return self._renamed(tool, "the tool {}")

    def in_calls(self, message: Message, index: int) -> Message:
        """Returns message number `index` with markers for the names in its tool calls."""
        if not message.get("tool_calls"):
            return message
        what = f"the call of {{}} in 'tool_calls' of message {index + 1}"
        return message | {"tool_calls": [self._renamed(c, what) for c in message["tool_calls"]]}

    def refuse_missing(self, text: str) -> None:
        """Raises `ChatTemplateError` for the first marker that is not in a render."""
        for marker, what in self.fields.items():
            if marker not in text:
                raise ChatTemplateError(f"the chat template leaves out {what}")

    def _renamed(self, function: Any, what: str) -> Any:
        named = function.get("function", function)
        named = named | {"name": self.mark(what.format(repr(named.get("name"))))}
        return function | {"function": named} if "function" in function else named


def with_one_thought(message: Message) -> Message:
    """The message without what no template reads, and with its thought under one name."""
    kept = {
        name: value
        for name, value in message.items()
        if value is not None and name not in THOUGHT_FIELDS and name != "weight"
    }
    kept.setdefault("content", "")
    thoughts = (message.get(name) for name in THOUGHT_FIELDS)
    thought = next((text for text in thoughts if text and text.strip()), None)
    return kept if thought is None else kept | {THOUGHT: thought}


def with_thought_apart(message: Message) -> Message:
    """The message with a thought at the head of its content moved into a field of its own."""
    if message["role"] != "assistant" or THOUGHT in message:
        return message
    head, opened, rest = message["content"].partition("<think>")
    thought, closed, content = rest.partition("</think>")
    if not (opened and closed and thought.strip()) or head.strip():
        return message
    return message | {"content": content.lstrip(), THOUGHT: thought.strip("\n")}
