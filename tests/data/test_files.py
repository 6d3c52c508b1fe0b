import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sap_fast.data import DataError, read_rows
from tests.data.chats import EXAMPLES, write


def test_every_format_reads_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a\u2028b", "n": [1, 2]}, {"prompt": "é", "n": []}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == rows
    assert read_rows(write(tmp_path / "rows.json", json.dumps(rows))) == rows
    assert read_rows(write(tmp_path / "rows.jsonl", text)) == rows
    windows = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n"
    assert read_rows(write(tmp_path / "windows.JSONL", windows)) == rows
    marked = b"\xef\xbb\xbf" + json.dumps(rows).encode()
    assert read_rows(write(tmp_path / "marked.json", marked)) == rows


@pytest.mark.parametrize(
    ("name", "content", "row", "problem"),
    [
        ("empty.jsonl", "", None, "an empty file"),
        ("blank.jsonl", " \n\n", None, "an empty file"),
        ("empty.json", "[]", None, "no rows"),
        ("rows.tsv", "a,b", None, "the suffix '.tsv'"),
        ("names.csv", "a,b", None, "no rows"),
        ("long.csv", "a,b\n1,2\n1,2,3", 2, "3 values"),
        ("doubled.csv", "a,a\n1,2", None, "two columns of one name"),
        ("open.csv", 'a,b\n1,"2', 1, "invalid CSV"),
        ("latin.csv", b"a\n\xe9", None, "byte 0xe9"),
        ("rows", "a,b", None, "no suffix"),
        ("bad.jsonl", '{"a": 1}\n\n{"a": ', 3, "invalid JSON"),
        ("list.jsonl", '{"a": 1}\n[1, 2]', 2, "a list of 2"),
        ("latin.jsonl", b'{"a": 1}\n{"a": "\xe9"}', 2, "byte 0xe9 at position 7"),
        ("latin.json", b'[{"a": "\xe9"}]', None, "byte 0xe9 at position 8"),
        ("bad.json", '{"a": 1}\n{"a": 2}', None, "invalid JSON (Extra data"),
        ("object.json", '{"a": 1}', None, "an object with the fields 'a'"),
        ("number.json", '[{"a": 1}, 7]', 2, "7"),
        ("deep.jsonl", "[" * 100_000, 1, "invalid JSON"),
        ("digits.jsonl", '{"a": ' + "1" * 5_000 + "}", 1, "invalid JSON"),
        ("bad.parquet", b"PAR1 but nothing else PAR1", None, "unreadable Parquet"),
    ],
)
def test_a_bad_file_names_file_and_row(tmp_path, name, content, row, problem):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    error = caught.value
    assert (error.path, error.row, error.field) == (path, row, None)
    assert error.problem.startswith(problem)
    where = str(path) if row is None else f"{path}, row {row}"
    assert str(error).startswith(f"{where}: got {problem}")
    assert "; expected " in str(error)
    assert "\n" not in str(error)


def test_a_corrupt_parquet_page_is_a_data_error(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": [f"text {index}" for index in range(2000)]})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    content = bytearray(path.read_bytes())
    content[10:600] = bytes(590)
    with pytest.raises(DataError, match="unreadable Parquet"):
        read_rows(write(path, bytes(content)))


def test_a_parquet_value_that_cannot_be_read_names_its_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    # Arrow checks neither text nor dates until they are read.
    for column, problem in (
        (pyarrow.array([b"a", b"b", b"\xff"]).view(pyarrow.utf8()), "byte 0xff"),
        (pyarrow.array([0, 0, 2**62], pyarrow.timestamp("us")), "date value out of range"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path)
        with pytest.raises(DataError, match=f"row 3: got unreadable Parquet .*{problem}"):
            read_rows(path)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="got no such file; expected an existing file"):
        read_rows(tmp_path / "missing.jsonl")
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="got a folder; expected a file"):
        read_rows(folder)


def test_a_data_error_survives_pickling():
    error = DataError("rows.jsonl", 3, "prompt", "a\nproblem", "text")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert str(error) == "rows.jsonl, row 3, field 'prompt': got a problem; expected text"
    assert vars(again) == vars(error)


@EXAMPLES
@given(st.binary(max_size=40) | st.text(alphabet='{}[]":,\n \r0a\ufeff\u2028', max_size=40))
def test_any_jsonl_gives_rows_or_a_data_error(tmp_path, content):
    path = write(tmp_path / "rows.jsonl", content)
    try:
        rows = read_rows(path)
    except DataError as error:
        assert error.path == path
        assert "\n" not in str(error)
    else:
        assert rows
        assert all(isinstance(row, dict) for row in rows)


def test_csv_holds_text_and_nothing(tmp_path):
    text = '\ufeffprompt,completion\r\n"a, b","c\nd"\r\n\r\n7,\r\n'
    rows = [{"prompt": "a, b", "completion": "c\nd"}, {"prompt": "7", "completion": None}]
    assert read_rows(write(tmp_path / "rows.csv", text.encode())) == rows


def test_a_split_of_a_folder_is_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    rows = {"train": [{"a": "x", "b": ["y"]}, {"a": "z", "b": None}], "test": [{"a": "t", "b": []}]}
    for split, content in rows.items():
        write(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in content))
    assert read_rows(f"{folder}:train") == rows["train"]
    assert read_rows(f"{folder}:test") == rows["test"]
    assert read_rows(f"{folder}:train[:1]+test") == [rows["train"][0], *rows["test"]]
    for name, problem in (
        (f"{folder}:valid", 'what cannot be loaded (Unknown split "valid"'),
        (f"{folder}x:train", "no suffix"),
    ):
        with pytest.raises(DataError) as caught:
            read_rows(name)
        assert caught.value.problem.startswith(problem) and str(caught.value).startswith(name)


def test_a_name_of_the_hub_is_left_to_datasets(monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        if split == "lost":
            raise ConnectionError("Couldn't reach\nit")
        return iter([{"a": 1}])

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_rows("org/name:train") == [{"a": 1}]
    assert asked == [("org/name", "train")]
    with pytest.raises(DataError, match=r"org/name:lost: got what cannot .*Couldn't reach it"):
        read_rows("org/name:lost")
