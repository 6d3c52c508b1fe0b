"""What the tests of the data start from."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.chats import CHATML, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(CHATML)
