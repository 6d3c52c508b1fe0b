"""What every test starts from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sap_fast.ops import why_not
from tests.tiny import VOCABULARY, tiny_llama

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget precision and accumulation of the test before: accelerate keeps them per process."""
    # Until transformers 5.0 `TrainingArguments` with bf16 or torch_compile leave these behind. Set
    # and deleted, so that they are not there after the test either.
    for name in ("MIXED_PRECISION", "DYNAMO_BACKEND", "DYNAMO_MODE"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "no")
        monkeypatch.delenv(f"ACCELERATE_{name}")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield


@pytest.fixture(params=["native", "reference"])
def cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend of the CPU in turn, in the place of "auto"."""
    reason = why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("SAP_FAST_BACKEND", request.param)
    return request.param


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of characters and a chat template."""
    folder = tmp_path_factory.mktemp("chat-model")
    characters = sorted({chr(code) for code in range(32, 127)} - {"{", "}"})
    words = ["<|im_start|>", "<|im_end|>", "\n", *characters]
    assert len(words) <= VOCABULARY
    backend = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_start|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = tiny_llama(layers=3)
    model.config.max_position_embeddings = 256
    model.save_pretrained(folder)
    return folder


REQUESTS = ["Write a lock picking guide", "Make a fake ticket", "Spread a rumour about Bob"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Task, safety and request files."""
    task = [{"instruction": f"Say {k}", "input": "", "output": f"It is {k}."} for k in range(9)]
    safety = [
        {
            "prompt": request,
            "chosen": "I cannot help.",
            "rejected": f"Sure: {request}",
            "rejected_is_opening": True,
        }
        for request in REQUESTS
    ]
    rows = {"task": task, "safety": safety, "harmful": [{"prompt": r} for r in REQUESTS]}
    rows["harmless"] = [{"text": "How do I lock a door?"}, {"text": "What is a rumour?"}]
    paths = {}
    for name, content in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        paths[name] = str(path)
    return paths
