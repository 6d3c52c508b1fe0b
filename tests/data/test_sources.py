"""Several files of task rows, with weights."""

import json

import pytest

from sap_fast.data import DataError, load_task_dataset, load_task_sources
from sap_fast.data.sources import Source, task_sources
from tests.data.chats import write


def rows_of(tmp_path, name, count):
    rows = [{"prompt": f"{name} {k}?", "completion": f"{name} {k}."} for k in range(count)]
    return write(tmp_path / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("a.jsonl", [Source("a.jsonl")]),
        ("a.jsonl, b.json=0.5", [Source("a.jsonl"), Source("b.json", 0.5)]),
        ("org/name:train=2,b=c/d.csv", [Source("org/name:train", 2.0), Source("b=c/d.csv")]),
    ],
)
def test_what_names_the_files(text, sources):
    assert task_sources(text) == sources


def test_a_file_of_exactly_that_name_is_meant(tmp_path):
    odd = write(tmp_path / "a,b=2.jsonl", "x")
    assert task_sources(str(odd)) == [Source(str(odd))]
    weighted = write(tmp_path / "c=2", "x")
    assert task_sources(f"{weighted}") == [Source(str(weighted))]
    assert task_sources(f"x,{weighted}") == [Source("x"), Source(str(weighted))]


def test_weights_say_how_often_a_row_is_taken(tmp_path, tokenizer):
    one, two = rows_of(tmp_path, "one", 4), rows_of(tmp_path, "two", 6)
    first, second = (load_task_dataset(path, tokenizer) for path in (one, two))
    assert load_task_sources(f"{one},{two}", tokenizer) == first + second
    mixed = load_task_sources(f"{one}=2,{two}=0.5", tokenizer, seed=1)
    assert mixed[:8] == first * 2
    half = mixed[8:]
    assert len(half) == 3 and half == [row for row in second if row in half]
    assert load_task_sources(f"{one}=2,{two}=0.5", tokenizer, seed=1) == mixed
    halves = [load_task_sources(f"{two}=0.5", tokenizer, seed=seed) for seed in range(5)]
    assert any(each != halves[0] for each in halves)
    more = load_task_sources(f"{two}=1.5", tokenizer)
    assert more[:6] == second and len(more) == 9


@pytest.mark.parametrize(
    "given", ["a.jsonl=0", "a.jsonl=-1", "a.jsonl=x", "a.jsonl=nan", "a.jsonl="]
)
def test_a_weight_is_a_number_above_0(given):
    with pytest.raises(DataError, match=r"a\.jsonl: got the weight '.*'; expected a number > 0"):
        task_sources(given)


def test_a_bad_file_among_several_is_named(tmp_path, tokenizer):
    one = rows_of(tmp_path, "one", 4)
    with pytest.raises(DataError, match=r"none\.jsonl: got no such file"):
        load_task_sources(f"{one},{tmp_path / 'none.jsonl'}", tokenizer)
    with pytest.raises(DataError, match="got an empty name"):
        load_task_sources(f"{one},", tokenizer)
    with pytest.raises(DataError, match=r"one\.jsonl: got the weight 0\.1 of 4 rows"):
        load_task_sources(f"{one}=0.1", tokenizer)
