"""Chats to token ids and labels: only the assistant's answers are scored."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from sap_fast.data.scoring import WHOLE_ANSWERS, AnswerScoring
from sap_fast.data.templates import Answer, ChatTemplate
from sap_fast.data.turns import (
    THOUGHT_FIELDS,
    Message,
    with_one_thought,
    with_thought_apart,
)
from sap_fast.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedRow(TypedDict):
    """One sequence: token ids, and labels that repeat them where they are scored (else -100)."""

    input_ids: list[int]
    labels: list[int]


def encode_turns(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    max_length: int | None = None,
    *,
    context: int = 0,
    complete: bool = True,
    tools: Sequence[Any] = (),
    template_kwargs: Mapping[str, Any] | None = None,
    scoring: AnswerScoring = WHOLE_ANSWERS,
) -> list[EncodedRow]:
    """Encodes a chat with the tokenizer's chat template and labels the assistant's answers.

    Each answer is its prompt, as inference would feed it (the template on the messages before,
    with the generation prompt), and what the template of the chat so far adds to it, through its
    end-of-turn token; white space that the template writes behind that token is not part of it.
    A template that ends no answer gets the tokenizer's end-of-sequence token.

    As long as the prompt of the next answer begins with the tokens so far, the next answer
    goes on in the same sequence. Where the template changes earlier turns (reasoning models leave
    the thoughts of the history out), the next answer begins a sequence of its own.

    A thought is trained where the data has one, in `reasoning_content` (or `reasoning`, or
    `thinking`) or as `<think>…</think>` at the head of the content. Where it has none and the
    template writes an empty one, that is read and not scored, as inference without thinking feeds
    it. `scoring` may leave thoughts unscored, or score only what the template's generation marks
    enclose; the tokens stay the same. One that is to be scored in part is scored.

    Assistant turns that are empty, or have the weight 0, are not scored. Tokens after the last
    scored one change nothing and are left out.

    Without a chat template the text is each prompt and a line break, then the answer and the
    end-of-sequence token; special tokens such as a beginning-of-sequence token are those that the
    tokenizer adds before plain text. With one, they are those that the template writes.

    Args:
        tokenizer: Any tokenizer of transformers.
        messages: The chat: `role`, `content` and what else a template reads, such as `tool_calls`.
            At least one message precedes the first assistant turn. `weight` may be 0 or 1.
        max_length: Number of tokens to keep from the beginning of a sequence; None keeps all.
        context: Number of leading messages whose answers are read but not scored.
        complete: Whether the last message is a finished turn. If False it is the opening of an
            answer: neither an end-of-turn token nor anything else follows its content.
        tools: JSON schemas of the tools that the chat may call.
        template_kwargs: Further variables for the template, such as `enable_thinking`.
        scoring: What of an answer is scored.

    Returns:
        `input_ids` and `labels`, of one length, per sequence that has something to score.

    Raises:
        ChatTemplateError: The template rejects the chat (some require alternating roles), leaves
            out a field of it, does not read one of `template_kwargs`, does not begin an answer
            where its generation prompt ends, or does not show what `scoring` asks for.
        ValueError: The tokenizer has neither a chat template nor an `eos_token`; or `max_length` is
            below 1.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length}; expected at least 1, or None for no limit")
    template = _template(tokenizer, tools, template_kwargs, scoring)
    scored = [
        index
        for index in range(context, len(messages))
        if _is_scored(messages[index], scoring.reasoning == "train")
    ]
    rows: list[EncodedRow] = []
    for answer in template.answers(messages, scored, complete=complete):
        prompt = _token_ids(tokenizer, answer.prompt)
        input_ids = _token_ids(tokenizer, answer.prompt + answer.text)
        if input_ids[: len(prompt)] != prompt:
            # A token joins the end of the prompt and the beginning of the answer: line breaks, for
            # instance. No model that is fed the prompt can write it.
            input_ids = prompt + _bare_token_ids(tokenizer, answer.text)
        labels = [IGNORE_INDEX] * len(prompt) + input_ids[len(prompt) :]
        if answer.scored is not None:
            places = _places(tokenizer, answer, prompt, input_ids)
            labels = [
                label if place in places else IGNORE_INDEX for place, label in enumerate(labels)
            ]
        if rows and prompt[: len(rows[-1]["input_ids"])] == rows[-1]["input_ids"]:
            before = rows.pop()["labels"]
            labels[: len(before)] = before
        rows.append({"input_ids": input_ids, "labels": labels})
    cut = [cut_row(row, max_length) for row in rows]
    return [row for row in cut if row["labels"]]


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    max_length: int | None = None,
    *,
    context: int = 0,
    complete: bool = True,
    tools: Sequence[Any] = (),
    template_kwargs: Mapping[str, Any] | None = None,
    scoring: AnswerScoring = WHOLE_ANSWERS,
) -> EncodedRow:
    """Encodes a chat as one sequence; arguments and rules are those of `encode_turns`.

    Where the template changes earlier turns, the answers do not fit into one sequence: the last
    one is returned, with a warning.

    Returns:
        `input_ids` and `labels`, of one length; both are empty if nothing is left to score.

    Raises:
        ChatTemplateError: As `encode_turns`.
        ValueError: As `encode_turns`.
    """
    rows = encode_turns(
        tokenizer,
        messages,
        max_length,
        context=context,
        complete=complete,
        tools=tools,
        template_kwargs=template_kwargs,
        scoring=scoring,
    )
    if len(rows) > 1:
        warnings.warn(
            f"the chat template changes earlier turns, so that the answers make {len(rows)} "
            "sequences: only the last is returned; encode_turns returns all",
            stacklevel=2,
        )
    return rows[-1] if rows else {"input_ids": [], "labels": []}


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Token ids of one user message, ready for the model to answer.

    Raises:
        ChatTemplateError: The chat template rejects the message.
        ValueError: As `encode_chat`.
    """
    template = _template(tokenizer, (), None)
    return _token_ids(tokenizer, template.prompt([{"role": "user", "content": prompt}]))


def padding_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token to pad with: the tokenizer's own, else the end-of-sequence token.

    Padding is masked and never scored, so any token serves.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def _template(
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Any],
    template_kwargs: Mapping[str, Any] | None,
    scoring: AnswerScoring = WHOLE_ANSWERS,
) -> ChatTemplate:
    if not tokenizer.chat_template and tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has neither a chat template nor an eos_token; expected one of them, "
            "to tell the model where an answer ends"
        )
    return ChatTemplate(tokenizer, tools, dict(template_kwargs or {}), scoring=scoring)


def _is_scored(message: Message, with_thought: bool) -> bool:
    if message["role"] != "assistant" or message.get("weight") == 0:
        return False
    if not with_thought:
        message = with_thought_apart(with_one_thought(message))
    fields = ("content", *THOUGHT_FIELDS) if with_thought else ("content",)
    texts = (message.get(name) for name in fields)
    return bool(message.get("tool_calls")) or any(text and text.strip() for text in texts)


def _places(
    tokenizer: "PreTrainedTokenizerBase",
    answer: Answer,
    prompt: Sequence[int],
    input_ids: Sequence[int],
) -> set[int]:
    """The tokens of an answer that are scored, in part or in whole."""

    def tokens_before(at: int) -> tuple[int, bool]:
        """How many tokens are whole before a place in the text, and whether none crosses it."""
        if at == len(answer.text):
            return len(input_ids), True
        text = answer.text[:at]
        before = _token_ids(tokenizer, answer.prompt + text)
        if before[: len(prompt)] != prompt:
            before = [*prompt, *_bare_token_ids(tokenizer, text)]
        pairs = zip(before, input_ids, strict=False)
        same = next((k for k, (a, b) in enumerate(pairs) if a != b), len(before))
        return same, same == len(before)

    places: set[int] = set()
    for start, end in answer.scored or ():
        first, _ = tokens_before(start)
        last, is_whole = tokens_before(end)
        places.update(range(first, last if is_whole else last + 1))
    return places


def _token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of the beginning of a sequence."""
    bare = _bare_token_ids(tokenizer, text)
    # A chat template writes the beginning-of-sequence token itself: adding it again doubles it.
    if tokenizer.chat_template:
        return bare
    whole = tokenizer(text, verbose=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        # Tokens that the tokenizer adds behind the text would end it before the answer.
        if whole[start : start + len(bare)] == bare:
            return whole[: start + len(bare)]
    return whole


def _bare_token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    # Sequences beyond the model's length are cut later: no warning is due.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def cut_row(row: EncodedRow, max_length: int | None) -> EncodedRow:
    """The first `max_length` tokens of a row, through the last one that is scored."""
    labels = row["labels"][:max_length]
    length = len(labels)
    while length > 0 and labels[length - 1] == IGNORE_INDEX:
        length -= 1
    return {"input_ids": row["input_ids"][:length], "labels": labels[:length]}
