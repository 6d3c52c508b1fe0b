"""Valid files of every layout, damaged: they train, or one error names the file and the row."""

from __future__ import annotations

import copy
import datetime
import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from sap_fast import contrastive_loss, task_loss
from sap_fast.cli.config import read_config
from sap_fast.cli.console import UserError
from sap_fast.cli.settings import FinetuneSettings
from sap_fast.data import (
    DataError,
    SafetyCollator,
    TaskCollator,
    load_requests,
    load_safety_dataset,
    load_task_dataset,
    padding_token_id,
)
from tests.data.chats import ALTERNATING, CHATML, build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*dropped")

TURNS = [
    {"role": "user", "content": "How do I bake bread?"},
    {"role": "assistant", "content": "Knead flour and water."},
]
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "task": [
        {"messages": TURNS},
        {"messages": TURNS + TURNS},
        {"prompt": "How do I bake bread?", "completion": "Knead flour and water."},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "Bake", "input": "bread", "output": "Knead."},
    ],
    "safety": [
        {"prompt": "How do I X?", "chosen": "I can't help.", "rejected": "Sure, here is how to X:"},
        {
            "prompt": "How do I X?",
            "chosen": "I can't help.",
            "rejected": "Sure, here",
            "rejected_is_opening": True,
        },
        {
            "chosen": [*TURNS[:1], {"role": "assistant", "content": "I can't help."}],
            "rejected": [*TURNS[:1], {"role": "assistant", "content": "Sure, here is how:"}],
        },
    ],
    "requests": [
        {"prompt": "How do I X?", "refusal": "I can't help.", "opening": "Sure:"},
        {"text": "How do I X?"},
        {"instruction": "Bake", "input": "bread"},
    ],
}

# What fields come to hold: other types, nothing, text that is hard to read or to encode.
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, 0, -1, 10**400, 1.5, math.nan, math.inf, "", " ", "\t\n", "\ud800", "\x00"),
        *("\x1b[2J", "\u202e", "é", "\u2028", "\ufeff", "a" * 3000, "<|im_end|>\n<|im_start|>user"),
        *([], {}, [[]], [None], [{}], {"role": "user"}, TURNS, TURNS[:1], TURNS[1:], TURNS[::-1]),
        *([{"role": "critic", "content": "x"}], [{"role": "assistant", "content": None}], [TURNS]),
        {"x" * 3000: 1} | {str(k): k for k in range(50)},
    ]
)
BYTES = [b"", b"\xff", b"\x00", b"\n\n", b"\r", b"{", b"]", b'"', b",", b"\xef\xbb\xbf", b"NaN"]
# Columns of types that no row should have, some of which have values that Python cannot hold.
COLUMNS = [
    pyarrow.array([2**62], pyarrow.timestamp("us")),
    pyarrow.array([1], pyarrow.timestamp("us", "Nowhere/At-All")),
    pyarrow.array([5 * 10**6], pyarrow.int32()).cast(pyarrow.date32()),
    pyarrow.array([datetime.date(2025, 5, 16)]),
    pyarrow.array([b"\xff"]),
    pyarrow.array([b"\xff"]).view(pyarrow.utf8()),
    pyarrow.array([[("role", "user")]], pyarrow.map_(pyarrow.string(), pyarrow.string())),
    pyarrow.array(["Bake"]).dictionary_encode(),
    pyarrow.array(["Bake"], pyarrow.large_string()),
    pyarrow.nulls(1),
]


TEXT = st.text(max_size=6)


def with_ending(value: Any, ending: str) -> Any:
    """A copy of a row in which all text but roles ends so, as no two files should be alike."""
    if isinstance(value, dict):
        return {
            key: each if key == "role" else with_ending(each, ending) for key, each in value.items()
        }
    if isinstance(value, list):
        return [with_ending(each, ending) for each in value]
    return value + ending if isinstance(value, str) else value


def happens(draw: Any, times: int, out_of: int) -> bool:
    # Not an integer's range, whose ends Hypothesis tries more often than the rest.
    return draw(st.sampled_from([True] * times + [False] * (out_of - times)))


class File(NamedTuple):
    """A file to load, and what is known about it.

    Attributes:
        name: of the file.
        content: its bytes; None for a folder.
        numbers: of the rows, as errors give them.
        damaged: indices of the rows that are not as in the layout; None where that is unknown.
    """

    name: str
    content: bytes | None
    numbers: list[int]
    damaged: set[int] | None


@st.composite
def damaged_rows(draw: Any, layouts: list[dict[str, Any]]) -> tuple[list[Any], set[int]]:
    """Rows, and which of them are damaged."""
    layout = draw(st.sampled_from(layouts))
    rows: list[Any] = [with_ending(layout, draw(TEXT)) for _ in range(draw(st.integers(1, 3)))]
    damaged = set()
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 2, 3]))):
        place = draw(st.integers(0, len(rows) - 1))
        damaged.add(place)
        row = rows[place]
        # Copies: what a later damage writes to must not be a value that others draw.
        odd = copy.deepcopy(draw(ODD))
        kind = draw(
            st.sampled_from(["value", "value", "drop", "rename", "add", "row", "turn", "turns"])
        )
        if kind == "row" or not isinstance(row, dict) or not row:
            rows[place] = copy.deepcopy(draw(st.sampled_from([odd, *layouts])))
            continue
        field = draw(st.sampled_from(sorted(row)))
        turns = row[field]
        if kind == "drop":
            del row[field]
        elif kind == "rename":
            row[draw(st.sampled_from([field.upper(), f" {field}", ""]))] = row.pop(field)
        elif kind == "add":
            row[draw(st.sampled_from(["messages", "prompt", "output", "x", ""]))] = odd
        elif kind == "value" or not (isinstance(turns, list) and turns):
            row[field] = odd
        elif kind == "turns":
            swapped, doubled = turns[::-1], [turns[0], *turns]
            row[field] = draw(st.sampled_from([swapped, doubled, turns[:-1], [*turns, odd], []]))
        elif isinstance(turns[0], dict):
            turn = turns[draw(st.integers(0, len(turns) - 1))]
            if isinstance(turn, dict):
                turn[draw(st.sampled_from(["role", "content", "name"]))] = odd
    return rows, damaged


@st.composite
def damaged_files(draw: Any, layouts: list[dict[str, Any]]) -> File:
    rows, known = draw(damaged_rows(layouts))
    damaged: set[int] | None = known
    numbers = list(range(1, len(rows) + 1))
    suffix = draw(st.sampled_from([".jsonl", ".JSONL", ".json", ".parquet"]))
    if suffix == ".parquet":
        content, damaged = draw(parquet(rows, known))
    elif suffix == ".json":
        content = dumped(rows).encode()
    else:
        end = draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]))
        numbers = [1 + end.count("\n") * index for index in range(len(rows))]
        lines = [dumped(row) for row in rows]
        if isinstance(rows[0], dict) and rows[0] and happens(draw, 1, 10):
            # The same key again: JSON readers take the last.
            lines[0] = f"{lines[0][:-1]}, {json.dumps(next(iter(rows[0])))}: 7}}"
            damaged = known | {0}
        content = end.join(lines).encode()
        content = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + content
    damage = draw(st.sampled_from([*"______________", "splice", "splice", "cut", "name", "folder"]))
    if damage == "splice":
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 30)))
        content = content[:start] + draw(st.sampled_from(BYTES)) + content[stop:]
    elif damage == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif damage == "name":
        name = draw(st.sampled_from(["rows.csv", "rows", "rows.txt", "missing.jsonl"]))
        return File(name, content, numbers, None)
    elif damage == "folder":
        return File(f"folder{suffix}", None, numbers, None)
    return File(f"two  rows{suffix}", content, numbers, damaged if damage == "_" else None)


@st.composite
def parquet(draw: Any, rows: list[Any], damaged: set[int]) -> tuple[bytes, set[int] | None]:
    """A Parquet file of the rows, and which of them are damaged, if that is known."""
    known: set[int] | None = damaged
    try:
        table = pyarrow.Table.from_pylist(rows)
        if not table.column_names:
            known = None  # such a file has no rows
    except (pyarrow.ArrowException, AttributeError, TypeError, ValueError, OverflowError):
        # Arrow has no type for such rows.
        table, known = pyarrow.table({"prompt": [1, 2]}), None
    if happens(draw, 1, 4):
        fields = sorted({*table.column_names, "x"})
        name, column = draw(st.sampled_from(fields)), draw(st.sampled_from(COLUMNS))
        table = table.slice(0, 1)
        if name in table.column_names and draw(st.booleans()):
            table = table.drop_columns([name])  # else there are two of the name
        if len(table) == len(column):
            table, known = table.append_column(name, column), None
    stream = io.BytesIO()
    try:
        pyarrow.parquet.write_table(table, stream)
    except pyarrow.ArrowException:  # a structure without fields, for one
        return b"PAR1", None
    return stream.getvalue(), known


def dumped(row: Any) -> str:
    try:
        return json.dumps(row)
    except ValueError:  # Python does not print the longest integers
        return json.dumps(row, default=str) if not isinstance(row, int) else "9" * 5000


Chat = tuple[Any, LlamaForCausalLM]


@pytest.fixture(scope="module", params=[CHATML, ALTERNATING], ids=["chatml", "alternating"])
def chat(request: pytest.FixtureRequest) -> Chat:
    """A tokenizer with a template that takes any roles, or turns in their order; and a model."""
    tokenizer = build_tokenizer(request.param)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return tokenizer, LlamaForCausalLM(config)


def check_error(error: DataError, path: Path, file: File) -> None:
    assert error.path == path
    message = str(error)
    where = f"{path}" if error.row is None else f"{path}, row {error.row}"
    assert message.startswith((f"{where}: got ", f"{where}, field '"))
    assert "\n" not in message and "; expected " in message and len(message) < 1500
    if file.damaged is None:
        assert error.row is None or error.row >= 1
    elif error.row is None:
        # Nobody's fault but that of all rows together.
        assert " left" in error.problem
    else:
        # The first row tells the layout of the others.
        assert {file.numbers.index(error.row), 0} & file.damaged


def check_rows(kind: str, rows: Any, chat: Chat, train: bool) -> None:
    if kind == "requests":
        assert all(request.prompt.strip() for request in rows)
        return
    tokenizer, model = chat
    pad = padding_token_id(tokenizer)
    collator = TaskCollator(pad) if kind == "task" else SafetyCollator(pad)
    batches: Any = collator(rows)
    for batch in [batches] if kind == "task" else batches.values():
        shape = batch["input_ids"].shape
        assert len(rows) == shape[0] and shape[1] <= 128
        assert all(tensor.shape == shape for tensor in batch.values())
        assert bool((batch["labels"] != -100).any(dim=1).all())
        assert int(batch["input_ids"].max()) < len(tokenizer)
    if train:
        if kind == "task":
            loss = task_loss(model, batches)
        else:
            loss = contrastive_loss(model, **batches)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        model.zero_grad()


@pytest.mark.parametrize(
    "examples", [400, pytest.param(3_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_damaged_files_train_or_are_refused_by_name(
    tmp_path: Path, chat: Chat, kind: str, examples: int
) -> None:
    tokenizer, _ = chat
    load = {
        "task": lambda path: load_task_dataset(path, tokenizer, max_length=128),
        "safety": lambda path: load_safety_dataset(path, tokenizer, max_length=128),
        "requests": load_requests,
    }[kind]
    seen: Counter[str] = Counter()
    files = set()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged_files(LAYOUTS[kind]))
    def run(file: File) -> None:
        files.add((file.name, file.content))
        path = tmp_path / file.name
        if file.content is None:
            path.mkdir(exist_ok=True)
        elif not file.name.startswith("missing"):
            path.write_bytes(file.content)
        try:
            rows = load(path)
        except DataError as error:
            assert file.damaged != set()
            check_error(error, path, file)
            seen["refused"] += 1
        else:
            check_rows(kind, rows, chat, train=seen["trained"] % 10 == 0)
            seen["trained"] += 1

    run()
    # Both happen often. Hypothesis also repeats itself: the many are at least 10,000 different
    # files, over three kinds and two templates.
    assert min(seen["trained"], seen["refused"]) > 0.1 * examples
    assert len(files) > 0.56 * examples


CONFIG = {
    **{"model": "m", "task": ["a.jsonl", "b.jsonl"], "output": "o", "batch_size": 4, "full": True},
    **{"learning_rate": 1e-4, "rho": "auto", "seed": 3, "max_steps": None, "lora-target": "q,v"},
    **{"early_stop": 2, "tokens_per_step": 4096, "scored": "turns", "reasoning": "mask"},
    **{"compile": None, "liger": False, "modules_to_save": ["lm_head"], "report_to": "none"},
}


@st.composite
def damaged_configs(draw: Any) -> tuple[str, bytes]:
    """The name and the content of a config file."""
    values: Any = dict(CONFIG)
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*sorted(CONFIG), "sed", "", "settings", "epochs"]))
        values[key] = copy.deepcopy(draw(ODD))
    suffix = draw(st.sampled_from([".yaml", ".yml", ".json"]))
    try:
        text = json.dumps(values) if suffix == ".json" else yaml.safe_dump(values)
    except (ValueError, yaml.YAMLError):  # the longest integers
        text = "seed: " + "9" * 5000
    content = text.encode("utf-8", "surrogatepass")
    if happens(draw, 1, 2):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 20)))
        splice = draw(
            st.sampled_from([*BYTES, b": ", b"- ", b"&a *a", b"!!python/name:os.x", b"%"])
        )
        content = content[:start] + splice + content[stop:]
    return f"two  runs{suffix}", content


@pytest.mark.parametrize(
    "examples", [400, pytest.param(3_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_damaged_configs_are_read_or_refused_by_name(tmp_path: Path, examples: int) -> None:
    hints = get_type_hints(FinetuneSettings)
    seen: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(damaged_configs())
    def run(file: tuple[str, bytes]) -> None:
        path = tmp_path / file[0]
        path.write_bytes(file[1])
        try:
            read = read_config(path, hints)
        except UserError as error:
            assert str(path) in str(error) and len(str(error)) < 1500
            assert "got " in str(error) or "key " in str(error)
            seen["refused"] += 1
            return
        seen["read"] += 1
        assert read.keys() <= hints.keys()
        for name, value in read.items():
            assert isinstance(value, hints[name]), name
        try:
            made = FinetuneSettings(**read)
            for follows in ("scoring", "saved_modules", "lora_targets", "sap_options", "probe"):
                getattr(made, follows)()
            made.reporters()
        except UserError as error:
            assert str(error).startswith("--")

    run()
    assert min(seen["read"], seen["refused"]) > 0.1 * examples
