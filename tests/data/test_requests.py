import pytest

from sap_fast.data import DataError, Request, load_requests
from tests.data.chats import write


def test_requests_from_every_field(tmp_path):
    rows = [
        {"prompt": "a", "text": "x", "refusal": "No", "opening": "Sure:"},
        {"text": "b", "instruction": "x", "refusal": None, "category": "hate"},
        {"instruction": "c", "input": "d", "output": "e"},
    ]
    expected = [Request("a", "No", "Sure:"), Request("b", category="hate")]
    expected.append(Request("c\n\nd"))
    assert load_requests(write(tmp_path / "rows.jsonl", rows)) == expected
    text = write(tmp_path / "rows.txt", " a\r\n\nb c\n")
    assert load_requests(text) == [Request("a"), Request("b c")]


@pytest.mark.parametrize(
    ("name", "content", "row", "field"),
    [
        ("rows.jsonl", '{"goal": "a"}', 1, None),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": [1]}', 2, "prompt"),
        ("rows.jsonl", '{"prompt": "a", "opening": 3}', 1, "opening"),
        ("rows.jsonl", '{"prompt": "a", "refusal": ""}', 1, "refusal"),
        ("rows.txt", b"a\n\n\xff", 3, None),
        ("rows.txt", " \n", None, None),
        ("rows.csv", "a", None, None),
    ],
)
def test_a_bad_request_file_names_file_row_and_field(tmp_path, name, content, row, field):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        load_requests(path)
    assert (caught.value.path, caught.value.row, caught.value.field) == (path, row, field)
    assert str(path) in str(caught.value)
