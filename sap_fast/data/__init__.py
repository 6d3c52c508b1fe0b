"""Reading, checking and encoding of task and safety data."""

from sap_fast.data.builtin import BUILTIN, BuiltinRequest, builtin_requests
from sap_fast.data.collate import SafetyCollator, TaskCollator
from sap_fast.data.datasets import (
    InspectedRow,
    SafetyRow,
    inspect_task_rows,
    load_safety_dataset,
    load_task_dataset,
)
from sap_fast.data.encoding import (
    EncodedRow,
    encode_chat,
    encode_prompt,
    encode_turns,
    padding_token_id,
)
from sap_fast.data.files import DataError, read_rows
from sap_fast.data.pairs import OPENINGS, REFUSALS, build_safety_pair
from sap_fast.data.requests import Request, load_requests, spread_requests
from sap_fast.data.scoring import AnswerScoring
from sap_fast.data.sources import load_task_sources
from sap_fast.data.turns import ChatTemplateError

__all__ = [
    "BUILTIN",
    "OPENINGS",
    "REFUSALS",
    "AnswerScoring",
    "BuiltinRequest",
    "ChatTemplateError",
    "DataError",
    "EncodedRow",
    "InspectedRow",
    "Request",
    "SafetyCollator",
    "SafetyRow",
    "TaskCollator",
    "build_safety_pair",
    "builtin_requests",
    "encode_chat",
    "encode_prompt",
    "encode_turns",
    "inspect_task_rows",
    "load_requests",
    "load_safety_dataset",
    "load_task_dataset",
    "load_task_sources",
    "padding_token_id",
    "read_rows",
    "spread_requests",
]
