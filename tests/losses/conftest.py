import functools
import warnings

import pytest
import torch
from transformers import LlamaModel

from sap_fast.losses import aside, head, packing
from tests.losses.helpers import ROWS_PER_CHUNK, VOCABULARY


@pytest.fixture
def several_chunks(monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", ROWS_PER_CHUNK * VOCABULARY * 4)


@pytest.fixture
def no_fallback_unnoticed():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # PEFT 0.19 says so of adapters on a head that is not tied, too.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        yield


@pytest.fixture
def forwards(monkeypatch):
    """The shapes that were packed, None where packing did not pay."""
    shapes, original = [], packing.pack

    def spy(*arguments):
        packed = original(*arguments)
        shapes.append(packed and tuple(packed.inputs["input_ids"].shape))
        return packed

    monkeypatch.setattr(packing, "pack", spy)
    return shapes


@pytest.fixture
def body_calls(monkeypatch):
    """What the body of a Llama is given, call by call; a hook would stop it from being packed."""
    calls, original = [], LlamaModel.forward

    @functools.wraps(original)
    def spy(self, *args, **kwargs):
        calls.append(
            {
                **kwargs,
                "index": packing.current_index(),
                "tested": aside.being_tested(),
                "training": self.training,
                "grad": torch.is_grad_enabled(),
            }
        )
        # As a model that is random in evaluation mode, too.
        torch.rand(int(aside.being_tested()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", spy)
    return calls


@pytest.fixture
def no_packing_refused(recwarn):
    yield
    assert [w for w in recwarn if "Batches are not packed" in str(w.message)] == []


@pytest.fixture
def refused(recwarn):
    """Says what packing was refused for, all the warnings so far."""
    return lambda: [str(w.message) for w in recwarn if "Batches are not packed" in str(w.message)]
