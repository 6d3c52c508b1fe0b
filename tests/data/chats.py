"""Templates, tokenizers and files for the tests of the data."""

from __future__ import annotations

import itertools
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sap_fast.data import EncodedRow

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes the beginning-of-sequence token and trims the content, as Llama 3 does.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}"
    "{{ m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
# Gives the answers after the last user message a reasoning block, as Qwen3 does.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Accepts nothing but user and assistant in turn, as Gemma and Mistral do.
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
)
# Begins answers with words that its generation prompt does not hold.
UNANNOUNCED = (
    "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
# Has no end-of-turn token, as GLM-4.
ENDLESS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
)
# Ends the last answer and the earlier ones differently, as gpt-oss does.
LAST_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '</s>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ends the last turn and the earlier turns differently, the user's too.
TWO_ENDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '</s>' if loop.last else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes the length of the answers, so that no answer changes alone.
COUNTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{{ m['content'] | length }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = [
    "Write a short poem about the sea.",
    "The sea is wide and blue, and it sings.\n\n    for wave in sea:\n        sing(wave)\n",
    "I'm sorry, but I can't help with that. Sure, here is how to write a poem:",
]
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "i"},
    {"role": "user", "content": "Write a poem"},
    {"role": "assistant", "content": "The sea, blue"},
]


USER, ASSISTANT = CHAT[0], CHAT[1]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
# Tokens of published templates, written as these are.
SPECIAL = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>|</?(?:start|end)_of_\w+>|</?think>|</?tool_call>")


def published_templates() -> dict[str, str]:
    """The chat templates of published models that TRL ships, by name."""
    folder = files("trl") / "chat_templates"
    if not folder.is_dir():
        return {}  # an older TRL
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".jinja"))
    return {name.removesuffix(".jinja"): (folder / name).read_text() for name in names}


def published_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with the tokens and the template of a published model."""
    template = published_templates()[name]
    tokenizer = build_tokenizer(template)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted(set(SPECIAL.findall(template)))}
    )
    return tokenizer


def build_tokenizer(chat_template: str | None, **model_options: object) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(**model_options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    # As Llama 3: offsets without leading spaces, and a beginning-of-sequence token on plain text.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    wrapped.chat_template = chat_template
    return wrapped


def chat(turns: int, *, system: bool = False, **answer: Any) -> list[dict[str, Any]]:
    """So many questions and answers, with `answer` in each message of the assistant."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}] if system else []
    for number in range(turns):
        messages.append({"role": "user", "content": f"Question {number}?"})
        messages.append({"role": "assistant", "content": f"Answer {number}.", **answer})
    return messages


def scored_text(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def scored_texts(tokenizer: PreTrainedTokenizerFast, rows: list[EncodedRow]) -> list[str]:
    """The text of each run of scored tokens, in order."""
    runs = []
    for row in rows:
        for scored, tokens in itertools.groupby(row["labels"], lambda label: label != -100):
            if scored:
                runs.append(tokenizer.decode(list(tokens)))
    return runs


def marked_text(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> str:
    """The text of a row, with [[brackets]] around what is scored."""
    text = ""
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for scored, tokens in itertools.groupby(pairs, lambda pair: pair[1] != -100):
        part = tokenizer.decode([token for token, _ in tokens])
        text += f"[[{part}]]" if scored else part
    return text


def write(path: Path, content: str | bytes | list[object]) -> Path:
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


EXAMPLES = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
