"""What the configuration of another stack says of SAP, with a file in the place of safety rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sap_fast.data import BUILTIN, SafetyCollator, load_safety_dataset, padding_token_id
from sap_fast.integrations.trainer import METHODS, SAFETY_LOSSES
from sap_fast.model.probes import ProbeSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SAPSettings:
    """The arguments of `SAPTrainerMixin` as text, numbers and mappings.

    Attributes:
        safety_dataset: A file of safety rows, as `sap_fast.data.load_safety_dataset` reads it.
        method: `"blend"` or `"sap"`.
        safety_batch_size: Safety rows per safety pass and rank.
        safety_loss: `"contrastive"`, `"difference"`, `"refusal"`, `"joint"` or `"kl"`; None for
            that of the method.
        probe: Keyword arguments of `ProbeSet`, with `"sap"`.
        sap_options: Keyword arguments of the optimizer.

    Raises:
        ValueError: A value or a keyword is not known.
    """

    safety_dataset: str
    method: str = "blend"
    safety_batch_size: int = 4
    safety_loss: str | None = None
    probe: Mapping[str, Any] = field(default_factory=dict)
    sap_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        if self.safety_loss is not None:
            _check_choice("safety_loss", self.safety_loss, SAFETY_LOSSES)
        if self.probe and self.method != "sap":
            raise ValueError(
                f"probe={dict(self.probe)} with method={self.method!r}, which has no probe"
            )
        if self.safety_dataset == BUILTIN:
            raise ValueError(
                f"safety_dataset={BUILTIN!r}: a model makes its pairs of the built-in requests "
                "before the training: sap-fast pairs --model MODEL --output pairs.jsonl; give that "
                "file"
            )
        # The model and what it trains come from the stack.
        _check_keywords("probe", self.probe, ProbeSet, without={"model"})
        _check_keywords(
            "sap_options",
            self.sap_options,
            METHODS[self.method].optimizer,
            without={"params", "probes", "grad_scaler"},
        )

    def trainer_arguments(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> dict[str, Any]:
        """Returns the keyword arguments of `SAPTrainerMixin`, with the rows of the file.

        Args:
            tokenizer: The model's, with the chat template that the task rows are written with.
            max_length: Tokens to keep of a row; None keeps all.

        Raises:
            DataError: The file cannot be used.
        """
        return {
            "safety_dataset": load_safety_dataset(self.safety_dataset, tokenizer, max_length),
            "safety_collator": SafetyCollator(padding_token_id(tokenizer)),
            "safety_batch_size": self.safety_batch_size,
            "safety_loss": self.safety_loss,
            "method": self.method,
            "probe": dict(self.probe),
            "sap_options": dict(self.sap_options),
        }


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def _check_keywords(name: str, given: Mapping[str, Any], of: type, *, without: set[str]) -> None:
    accepted = [key for key in inspect.signature(of).parameters if key not in without]
    unknown = [str(key) for key in given if key not in accepted]
    if unknown:
        raise ValueError(
            f"{name}: {', '.join(unknown)} is not known to {of.__name__}, which takes "
            f"{', '.join(accepted)}"
        )
