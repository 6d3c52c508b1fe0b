"""What a chat template writes: the prompt of an answer, and what it adds to it for the answer.

Nothing is known about a template but what it renders, so a question to it is put as a chat with
markers in it: where a marker comes out is where the template writes the field, and a marker that
does not come out is a field that it leaves out.
"""

import dataclasses
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from sap_fast.data.scoring import (
    WHOLE_ANSWERS,
    AnswerScoring,
    Span,
    has_marks,
    made_visible,
    marked_spans,
    within,
)
from sap_fast.data.turns import (
    THOUGHT,
    THOUGHT_FIELDS,
    ChatTemplateError,
    Markers,
    Message,
    with_one_thought,
    with_thought_apart,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How a chat reads for a tokenizer without a chat template: each prompt ends its line, and each
# answer is followed by the end-of-sequence token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)

# The switches of thinking: Qwen3, GLM and Nemotron read the first, DeepSeek-V3.1 the second.
_SWITCHES = ("enable_thinking", "thinking")
_OPENED_THOUGHT = re.compile(r"<think>(\s*)\Z")
_EMPTY_THOUGHT = re.compile(r"\s*(<think>\s*)?</think>\s*")
_CLOSED_THOUGHT = re.compile(r".*?</think>\s*", re.DOTALL)


class _RejectedError(ChatTemplateError):
    """What a template raised."""


class Answer(NamedTuple):
    """One answer as text.

    Attributes:
        prompt: What inference feeds before it.
        text: What the model is to write.
        scored: The parts of `text` that are scored; None for all of it.
    """

    prompt: str
    text: str
    scored: Sequence[Span] | None = None


class _Basis(NamedTuple):
    """What an answer is rendered behind, to see what the template adds for it.

    Attributes:
        prompt: What inference feeds.
        shown: The messages that the answer is rendered behind.
        start: How that render begins: `prompt`, or what stands in its place.
        switches: The switches of thinking that `prompt` was rendered with.
        closing: What closes the thought that `prompt` opens, where the answer is not rendered so.
    """

    prompt: str
    shown: Sequence[Message]
    start: str
    switches: dict[str, bool]
    closing: str | None = None


_Read = TypeVar("_Read")
_Reader = Callable[["ChatTemplate", Sequence[Message]], _Read]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with what a row passes to it and how it wants its messages.

    Attributes:
        tokenizer: Any tokenizer of transformers.
        tools: JSON schemas of the tools that the chat may call.
        options: Further variables for the template, such as `enable_thinking`.
        content_in_parts: Whether content goes in as a list of parts, as templates of models with
            images want it.
        arguments_as_text: Whether the arguments of tool calls go in as JSON text, as DeepSeek-V3
            wants them, and not as objects.
        scoring: What of the answers is scored.
    """

    tokenizer: "PreTrainedTokenizerBase"
    tools: Sequence[Any] = ()
    options: dict[str, Any] = field(default_factory=dict)
    content_in_parts: bool = False
    arguments_as_text: bool = False
    scoring: AnswerScoring = WHOLE_ANSWERS

    def answers(
        self, messages: Sequence[Message], scored: Sequence[int], *, complete: bool = True
    ) -> list[Answer]:
        """The answers at the places `scored`, each with its prompt.

        Args:
            messages: The chat.
            scored: Places of assistant turns, at least one message before each.
            complete: Whether the last message is a finished turn; else it is an opening of one.

        Raises:
            ChatTemplateError: The template rejects the chat, leaves a field of it out, does not
                begin an answer where its generation prompt ends, or does not show what of an answer
                is to be scored.
        """
        self._refuse_options()
        if self.scoring.by == "template" and not self.has_marks:
            raise ChatTemplateError("the chat template has no {% generation %} marks")

        def read(template: ChatTemplate, chat: Sequence[Message]) -> list[Answer]:
            last = len(chat) - 1
            return [
                template._answer(chat, index, complete=complete or index < last) for index in scored
            ]

        return self._first_reading(messages, read)

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what is generated, by `{% generation %}`."""
        return has_marks(self._source())

    def prompt(self, messages: Sequence[Message]) -> str:
        """What inference feeds so that the model answers `messages`.

        Raises:
            ChatTemplateError: The template rejects the chat, or leaves a field of it out.
        """

        def read(template: ChatTemplate, chat: Sequence[Message]) -> str:
            template._refuse_what_the_prompt_leaves_out(chat, {})
            return template._render(chat, generation=True)

        return self._first_reading(messages, read)

    def _first_reading(self, messages: Sequence[Message], read: _Reader[_Read]) -> _Read:
        """What `read` makes of the first form of the messages that the template takes."""
        plain = [with_one_thought(message) for message in messages]
        parted = [with_thought_apart(message) for message in plain]
        calls = any(message.get("tool_calls") for message in plain)
        errors = []
        for in_parts in (False, True):
            if in_parts and self._takes_text():
                break
            for chat in (plain,) if parted == plain else (parted, plain):
                for as_text in (False, True) if calls else (False,):
                    form = dataclasses.replace(
                        self, content_in_parts=in_parts, arguments_as_text=as_text
                    )
                    try:
                        return read(form, chat)
                    except ChatTemplateError as error:
                        errors.append((in_parts, error))
        # The first form that would have been right: with parts, unless the template rejects them.
        first = errors[0][1]
        if errors[-1][0] and not isinstance(errors[-1][1], _RejectedError):
            first = next(error for in_parts, error in errors if in_parts)
        if isinstance(first, _RejectedError):
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ChatTemplateError(
                f"the chat template rejects a chat with the roles {roles}: {first}"
            ) from first
        raise first

    def _takes_text(self) -> bool:
        """Whether content goes in as text: templates of models with images take lists of parts."""
        marker = Markers().mark("content")
        try:
            return marker in self._render([{"role": "user", "content": marker}], generation=True)
        except _RejectedError:
            return not self.reads("text")

    def _answer(self, messages: Sequence[Message], index: int, *, complete: bool) -> Answer:
        before, answer = messages[:index], messages[index]
        first_error = None
        for basis, added in self._bases(before, answer):
            try:
                self._refuse_what_the_prompt_leaves_out(before, basis.switches)
                return self._answer_behind(basis, added, answer, index, complete=complete)
            except ChatTemplateError as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error
        prompt = self._render(before, generation=True)
        raise ChatTemplateError(
            f"the chat template does not begin the answer of message {index + 1} where its "
            f"generation prompt ends ({prompt[-40:]!r})"
        )

    def _answer_behind(
        self, basis: _Basis, added: str, answer: Message, index: int, *, complete: bool
    ) -> Answer:
        """The answer, of which the template adds `added` to a basis."""
        marker = Markers().mark("content")
        thought = answer.get(THOUGHT)
        plain = {"role": "assistant", "content": marker} | ({THOUGHT: thought} if thought else {})
        lead, found, closing = (self._added(basis, plain) or "").partition(marker)
        if not found or THOUGHT in with_thought_apart(answer) or answer.get("tool_calls"):
            self._refuse_what_the_answer_leaves_out(basis, answer, index)
        prompt, text = basis.prompt, added
        before = 0  # what `text` has before `added`, or without it
        if basis.closing is not None:
            if thought:
                lead = thought.strip("\n") + basis.closing
                text, before = lead + text, len(lead)
            else:
                prompt += basis.closing
        elif not thought:
            # The model is not to learn that it has nothing to think: its thought is closed for it,
            # as inference without thinking does.
            empty = self._empty_thought(basis, lead)
            if text.startswith(empty):
                prompt, text, before = prompt + empty, text.removeprefix(empty), -len(empty)
        if not (found and text.endswith(closing)) and not answer.get("tool_calls"):
            raise ChatTemplateError(
                f"the chat template changes more than the answer when the answer of message "
                f"{index + 1} changes"
            )
        end = ""
        if not complete:
            if answer.get("tool_calls"):
                raise ChatTemplateError("an opening of an answer cannot hold tool calls")
            text = text.removesuffix(closing)
        elif found and not closing.strip():
            if self.tokenizer.eos_token is None:
                raise ChatTemplateError(
                    "the chat template ends no answer, and the tokenizer has no eos_token"
                )
            text, end = text.removesuffix(closing), str(self.tokenizer.eos_token)
        else:
            text = text.rstrip()
        scored = self._scored(basis, added, answer, index, lead, text, before)
        if scored and scored[-1][1] == len(text):
            scored = [*scored[:-1], (scored[-1][0], len(text + end))]
        return Answer(prompt, text + end, scored)

    def _scored(
        self,
        basis: _Basis,
        added: str,
        answer: Message,
        index: int,
        lead: str,
        text: str,
        before: int,
    ) -> list[Span] | None:
        """The parts of an answer's text that are scored; None for all.

        Args:
            basis: What the answer was rendered behind.
            added: What the template adds to it.
            answer: The message.
            index: Its place in the chat.
            lead: What the template writes before content like this answer's.
            text: The answer as it is trained, without an end that the template does not write.
            before: How many characters it has before what is `added`; negative for what it lacks.
        """
        first = 0
        if self.scoring.reasoning == "mask" and THOUGHT in with_thought_apart(answer):
            first = self._end_of_thought(basis, answer, index, lead, text)
        if self.scoring.by == "turns" or not self.has_marks:
            return [(first, len(text))] if first else None
        if basis.closing is not None:
            answer = {name: value for name, value in answer.items() if name != THOUGHT}
        chat = [*basis.shown, answer]
        whole = self._render(chat, **basis.switches)
        spans = marked_spans(self._render(chat, marks=True, **basis.switches), whole)
        # What is added is the end of the whole.
        shift = before - (len(whole) - len(added))
        moved = [(start + shift, end + shift) for start, end in spans]
        if basis.closing is not None:
            moved.insert(0, (0, before))  # a thought, which this template writes nowhere
        moved = within(moved, first, len(text))
        if not moved:
            raise ChatTemplateError(
                f"the chat template marks nothing of the answer of message {index + 1} as generated"
            )
        return moved

    def _end_of_thought(
        self, basis: _Basis, answer: Message, index: int, lead: str, text: str
    ) -> int:
        """Where in an answer's text the thought ends that it begins with."""
        thought = with_thought_apart(answer)[THOUGHT].strip()
        if THOUGHT in answer and thought in lead and text.startswith(lead):
            return len(lead)
        if closed := _CLOSED_THOUGHT.match(text):
            return closed.end()
        # Behind it the answer reads as if there had been none.
        without = {name: value for name, value in answer.items() if name != THOUGHT}
        rest = self._added(basis, without) or ""
        backwards = zip(reversed(rest.rstrip()), reversed(text), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], backwards))
        end = len(text) - shared
        content = answer["content"].strip()
        if not shared or thought not in text[:end] or content not in text[end:]:
            raise ChatTemplateError(
                f"the chat template does not show where the thought of message {index + 1} ends, "
                "so that it cannot be left unscored"
            )
        return end

    def _bases(self, before: Sequence[Message], answer: Message) -> Iterator[tuple[_Basis, str]]:
        """Ways to see what the template adds for an answer, from the plainest to the last resort.

        First the prompt as it is, then with thinking switched as the answer has it (the prompt of
        Nemotron opens a thought, that of Qwen3.5-nothink closes it). Then the last question alone,
        since templates write a system message into the last turn (Mistral-Nemo) or leave out the
        thoughts before a tool call once it was answered (gpt-oss). Last, behind a prompt that
        opens a thought, the answer as if it did not (DeepSeek-R1, which renders no thoughts).
        """
        names = [name for name in _SWITCHES if name not in self.options and self.reads(name)]
        settings = [{}, dict.fromkeys(names, THOUGHT in answer)] if names else [{}]
        bases = []
        for setting in settings:
            prompt = self._render(before, generation=True, **setting)
            bases.append(_Basis(prompt, before, prompt, setting))
            if (added := self._added(bases[-1], answer)) is not None:
                yield bases[-1], added
        question = [message for message in before if message["role"] == "user"][-1:]
        for basis in bases if question and len(before) > 1 else ():
            start = self._render(question, generation=True, **basis.switches)
            alone = basis._replace(shown=question, start=start)
            end = start.rpartition(question[0]["content"].strip())[2]
            if basis.prompt.endswith(end) and (added := self._added(alone, answer)) is not None:
                yield alone, added
        for basis in bases:
            if opened := _OPENED_THOUGHT.search(basis.prompt):
                closing = "\n</think>\n\n" if opened[1] else "</think>"
                start = basis.prompt[: opened.start()]
                unopened = basis._replace(start=start, closing=closing)
                if (added := self._added(unopened, answer)) is not None:
                    yield unopened, added

    def _added(self, basis: _Basis, answer: Message) -> str | None:
        """What the template adds for an answer; None if it changes what was before."""
        if basis.closing is not None:
            answer = {name: value for name, value in answer.items() if name != THOUGHT}
        whole = self._render([*basis.shown, answer], **basis.switches)
        if not whole.startswith(basis.start):
            return None
        added = whole[len(basis.start) :]
        if basis.closing is None:
            return added
        if empty := _EMPTY_THOUGHT.match(added):
            added = added[empty.end() :]
        return None if added.startswith("<think>") else added

    def _empty_thought(self, basis: _Basis, lead: str) -> str:
        """The part of `lead`, which precedes an answer without a thought, that is an empty one."""
        if empty := _EMPTY_THOUGHT.match(lead):
            return empty[0]
        if not lead.strip():
            return ""
        markers = Markers()
        content, thought = markers.mark("content"), markers.mark("thought")
        thinking = {"role": "assistant", "content": content, THOUGHT: thought}
        its_lead = (self._added(basis, thinking) or "").partition(content)[0]
        emptied = its_lead.replace(thought, "")
        is_empty = emptied != its_lead and "".join(emptied.split()) == "".join(lead.split())
        return lead if is_empty else ""

    def _refuse_what_the_prompt_leaves_out(
        self, messages: Sequence[Message], switches: dict[str, bool]
    ) -> None:
        """Raises for what comes before an answer and is not in its prompt.

        Content and thoughts of earlier answers are the template's to leave out, as it does at
        inference.
        """
        markers = Markers()
        tools = [markers.in_tool(tool) for tool in self.tools]
        marked = []
        for index, message in enumerate(messages):
            message = markers.in_calls(message, index)
            if message["role"] != "assistant" and message["content"].strip():
                what = f"the content of message {index + 1} ({message['role']})"
                message = message | {"content": markers.mark(what)}
            marked.append(message)
        template = dataclasses.replace(self, tools=tools)
        markers.refuse_missing(template._render(marked, generation=True, **switches))

    def _refuse_what_the_answer_leaves_out(
        self, basis: _Basis, answer: Message, index: int
    ) -> None:
        markers = Markers()
        marked = markers.in_calls(answer, index)
        if THOUGHT in answer and basis.closing is None:
            marked = marked | {THOUGHT: markers.mark(f"the {THOUGHT!r} of message {index + 1}")}
        content = ""
        if THOUGHT in with_thought_apart(answer) and THOUGHT not in answer:
            thought = markers.mark(f"the thought in the content of message {index + 1}")
            content = f"<think>\n{thought}\n</think>\n\n"
        if answer["content"].strip():
            content += markers.mark(f"the content of message {index + 1} (assistant)")
        added = self._added(basis, marked | {"content": content})
        markers.refuse_missing(added or "")

    def _refuse_options(self) -> None:
        # What is an argument of its own is no variable.
        taken = inspect.signature(self.tokenizer.apply_chat_template).parameters
        for name in self.options:
            if name in taken or name == "messages" or not self.reads(name):
                raise ChatTemplateError(
                    f"the chat template does not read {name!r} of 'chat_template_kwargs'"
                )

    def reads(self, name: str) -> bool:
        """Whether the template mentions a field or variable of this name."""
        return re.search(rf"\b{re.escape(name)}\b", self._source()) is not None

    def _source(self) -> str:
        if not self.tokenizer.chat_template:
            return PLAIN_TEMPLATE
        return str(self.tokenizer.get_chat_template(tools=list(self.tools) or None))

    def _render(
        self,
        messages: Sequence[Message],
        *,
        generation: bool = False,
        marks: bool = False,
        **switches: bool,
    ) -> str:
        """What the template writes, with `marks` also where its generation marks are."""
        from jinja2 import TemplateError

        arguments: dict[str, Any] = {
            "tools": list(self.tools) or None,
            "chat_template": None if self.tokenizer.chat_template else PLAIN_TEMPLATE,
            "tokenize": False,
            "add_generation_prompt": generation,
            **self.options,
            **switches,
        }
        if marks:
            arguments["chat_template"] = made_visible(self._source())
        formed = [self._formed(message) for message in messages]
        try:
            text = cast(str, self.tokenizer.apply_chat_template(formed, **arguments))
            # No tokenizer takes half of a surrogate pair, which JSON may escape: in a tool, say.
            text.encode()
        # What a template computes on a chat may fail in Python's ways too.
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise _RejectedError(str(error)) from error
        return text

    def _formed(self, message: Message) -> Message:
        formed = dict(message)
        if THOUGHT in message:
            formed |= dict.fromkeys(THOUGHT_FIELDS, message[THOUGHT])
        if self.content_in_parts:
            formed["content"] = [{"type": "text", "text": message["content"]}]
        if message.get("tool_calls"):
            formed["tool_calls"] = [self._formed_call(call) for call in message["tool_calls"]]
        return formed

    def _formed_call(self, call: Any) -> Any:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if self.arguments_as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not self.arguments_as_text and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return call
        function = function | {"arguments": arguments}
        return call | {"function": function} if "function" in call else function
