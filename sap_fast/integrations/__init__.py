"""Adapters to training stacks."""

from sap_fast.compatibility import require

require("transformers", "peft", "accelerate")
