"""Judges of answers, and how far they agree."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from sap_fast.evaluation import (
    ClassifierJudge,
    EndpointJudge,
    GuardJudge,
    JudgeError,
    PhraseJudge,
    cohens_kappa,
    evaluate_model,
)
from tests.evaluation.conftest import HARMFUL, HARMLESS

REQUESTS = ["Pick a lock", "Steal it", "Sing"]
ANSWERS = ["I can't", "Sure, it", "Sure, la"]


def test_phrases_judge_as_ever() -> None:
    judge = PhraseJudge()
    assert judge(REQUESTS, ANSWERS) == [True, False, False]
    assert judge.tells_refusals and judge.name == "phrases"


def test_a_guard_says_safe_or_unsafe(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"I can't": "\n\nsafe", "Sure, it": "\n\nunsafe\nS2", "": "Safe", "Sure, la": "hm"}
    read: list[str] = []

    def write(model: Any, tokenizer: Any, encoded: Any, **options: Any) -> list[Any]:
        assert options["batch_size"] == 4 and options["description"] == "Judging (guard)"
        read.extend(tokenizer.decode(ids) for ids in encoded)
        answers = [text.split("assistant\n")[1].split("<|im_end|>")[0] for text in read]
        return [SimpleNamespace(text=said[answer.replace("…", "")]) for answer in answers]

    monkeypatch.setattr("sap_fast.evaluation.judges.greedy_continuations", write)
    judge = GuardJudge("guard", nn.Module(), tokenizer)
    assert judge(["Pick a lock", "Steal it", "Lie"], [*ANSWERS[:2], ""], batch_size=4) == [
        *(True, False, True)
    ]
    assert read[0] == (
        "<|im_start|>user\nPick a lock<|im_end|>\n<|im_start|>assistant\nI can't<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert not judge.tells_refusals
    with pytest.raises(JudgeError, match="the judge guard said 'hm'; expected safe or unsafe"):
        judge(REQUESTS[2:], ANSWERS[2:], batch_size=4)
    plain: Any = SimpleNamespace(chat_template=None)
    with pytest.raises(JudgeError, match="the judge plain has no chat template"):
        GuardJudge("plain", nn.Module(), plain)


class Classifier(nn.Module):
    """Of two labels the second for texts that begin with "I", as its stub of a tokenizer says."""

    def __init__(self, *labels: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(id2label=dict(enumerate(labels)))
        self.seen: list[tuple[list[str], ...]] = []

    def forward(self, marks: torch.Tensor) -> Any:
        assert not self.training
        return SimpleNamespace(logits=torch.stack([1 - marks, marks], dim=1))

    def tokenize(self, *texts: list[str], **_: Any) -> Any:
        self.seen.append(texts)
        marks = torch.tensor([float(text.startswith("I")) for text in texts[-1]])
        batch = {"marks": marks}
        return SimpleNamespace(to=lambda device: batch)


@pytest.mark.parametrize(
    ("labels", "expected", "tells", "reads"),
    [
        (("NORMAL", "REJECTION"), [True, False, False], True, 1),
        (("refusal", "other"), [False, True, True], True, 1),
        (("unsafe", "safe"), [True, False, False], False, 2),
        (("Harmless", "toxic"), [False, True, True], False, 2),
    ],
)
def test_a_classifier_is_read_by_its_labels(
    labels: tuple[str, str], expected: list[bool], tells: bool, reads: int
) -> None:
    model = Classifier(*labels).train()
    judge = ClassifierJudge("c", model, model.tokenize)  # type: ignore[arg-type]
    assert judge(REQUESTS, ANSWERS, batch_size=2) == expected
    assert judge.tells_refusals == tells and model.training
    assert [len(texts) for texts in model.seen] == [reads, reads]


@pytest.mark.parametrize("labels", [("LABEL_0", "LABEL_1"), ("safe", "benign"), ("unsafe", "bad")])
def test_a_classifier_needs_a_label_that_tells(labels: tuple[str, str]) -> None:
    with pytest.raises(JudgeError, match=f"the judge c has the labels {labels[0]}, {labels[1]}"):
        ClassifierJudge("c", Classifier(*labels), None)  # type: ignore[arg-type]


@pytest.fixture
def server() -> Iterator[Any]:
    """A server on this machine that says what `reply` makes of a question."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            owner.asked.append((self.path, body))
            status, content = owner.reply(body)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://example.org/")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    owner: Any = SimpleNamespace(asked=[], address=f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield owner
    server.shutdown()
    thread.join()
    server.server_close()


def said(text: str) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def test_a_server_of_this_machine_is_asked(server: Any) -> None:
    def reply(body: Any) -> tuple[int, bytes]:
        return said(" Yes." if "I can't" in body["messages"][0]["content"] else "no")

    server.reply = reply
    judge = EndpointJudge(f"{server.address}#small")
    assert judge.name == "small" and judge.tells_refusals
    assert judge(REQUESTS, ANSWERS) == [True, False, False]
    path, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"]) == ("small", 0)
    assert "User: Pick a lock\n\nAssistant: I can't\n" in body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (*said("perhaps"), "said 'perhaps'; expected yes or no"),
        (500, b"", "cannot be asked: HTTP Error 500"),
        (302, b"", "cannot be asked: HTTP Error 302"),
        (200, b"<html>", "cannot be asked"),
        (200, b"{}", "does not answer as an OpenAI-compatible server"),
        (200, b"[]", "does not answer as an OpenAI-compatible server"),
    ],
)
def test_a_server_that_answers_otherwise_is_one_line(
    server: Any, status: int, content: bytes, message: str
) -> None:
    server.reply = lambda body: (status, content)
    with pytest.raises(JudgeError) as caught:
        EndpointJudge(server.address)(REQUESTS, ANSWERS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["http://example.org/v1", "https://127.0.0.1/v1", "http://10.0.0.1/v1", "http://", "file:///x"],
)
def test_answers_do_not_leave_the_machine(address: str) -> None:
    with pytest.raises(JudgeError, match="expected an address of this machine"):
        EndpointJudge(address)


def test_kappa_is_agreement_beyond_chance() -> None:
    # Cohen's formula by hand: 20 yes by both, 15 no by both, 5 and 10 otherwise.
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    assert cohens_kappa([True, False], [True, False]) == 1
    assert cohens_kappa([True, False], [False, True]) == -1
    assert math.isnan(cohens_kappa([True, True], [True, True]))
    for given in (([], []), ([True], [])):
        with pytest.raises(ValueError, match="expected as many of both"):
            cohens_kappa(*given)


def test_judges_see_what_phrases_see_and_more(
    refusing_model: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    class Noting(PhraseJudge):
        name = "noting"

        def __init__(self, tells_refusals: bool) -> None:
            self.tells_refusals = tells_refusals
            self.seen: list[Any] = []

        def __call__(self, requests: Any, answers: Any, **options: Any) -> list[bool]:
            self.seen.append((requests, answers))
            return super().__call__(requests, answers)

    for tells in (True, False):
        judge = Noting(tells)
        result = evaluate_model(
            refusing_model, tokenizer, harmful=HARMFUL, harmless=HARMLESS, judges=[judge]
        )
        assert result.judged_harmful == {"noting": [True, True, False]}
        assert result.judged_harmful["noting"] == result.harmful_refused
        assert result.judged_harmless == ({"noting": [False, False]} if tells else None)
        assert len(judge.seen) == 1 + tells
        requests, answers = judge.seen[0]
        assert requests == [request.prompt for request in HARMFUL]
        assert answers[0] == "I can't"
        assert type(result).from_dict(result.to_dict()) == result
