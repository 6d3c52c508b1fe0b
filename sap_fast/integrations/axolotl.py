"""SAP in Axolotl, which loads it by name from its YAML.

    plugins:
      - sap_fast.integrations.axolotl.SAPPlugin
    sap_safety_dataset: pairs.jsonl

Written for the interface of Axolotl 0.19. `examples/axolotl.yaml` is a whole configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, Field
from transformers import Trainer

from sap_fast.integrations.settings import SAPSettings
from sap_fast.integrations.trainer import SAPTrainerMixin

#: Keys that ask Axolotl for another objective than the likelihood of answers.
_OTHER_OBJECTIVES = ("rl", "reward_model", "process_reward_model")


class SAPProbe(BaseModel):
    """Keywords of `ProbeSet`; those that are left out have its defaults."""

    model_config = ConfigDict(extra="forbid")

    layers: Literal["early", "middle"] | list[int] | None = None
    size: float | None = None
    rule: Literal["normalized", "lean", "gradient", "adam"] | None = None
    rho: float | Literal["auto"] | None = None
    difference: Literal["central", "forward"] | None = None
    rows: float | None = None
    own_rows: bool | None = None
    passes: Literal["two", "paired", "auto"] | None = None
    checkpointing: Literal["none", "layers", "auto"] | None = None


class SAPOptions(BaseModel):
    """Keywords of `SafetyPasses`; those that are left out have the defaults of the method.

    What belongs to the update has Axolotl's own keys: `learning_rate`, `adam_beta1`, `optimizer`.
    """

    model_config = ConfigDict(extra="forbid")

    safety_weight: float | None = None
    #: A word for no level, as Axolotl drops keys without a value.
    safety_level: float | Literal["auto", "none"] | None = None
    rule: Literal["blend", "project", "floor"] | None = None
    direction_every: int | None = None
    backend: Literal["auto", "native", "triton", "reference"] | None = None


class SAPArgs(BaseModel):
    """The keys of SAP in Axolotl's YAML."""

    sap_safety_dataset: str = Field(
        description="File of safety rows: prompt, chosen (the safe answer) and rejected (the "
        "harmful one, or its opening). sap-fast pairs makes one."
    )
    sap_method: Literal["blend", "sap"] = Field(
        default="blend", description="blend: the safety gradient is blended in; sap: probes."
    )
    sap_safety_batch_size: int = Field(default=4, ge=1, description="Safety rows of a step.")
    sap_safety_loss: str | None = Field(
        default=None, description="One of sap_fast.losses; the method's own if left out."
    )
    sap_probe: SAPProbe | None = Field(default=None, description="With sap_method: sap.")
    sap_options: SAPOptions | None = Field(default=None, description="Of both methods.")


class SAPPlugin(BasePlugin):
    """Puts `SAPTrainerMixin` in front of Axolotl's trainer, or of the one that it is told of."""

    def register(self, cfg: Any) -> None:
        """Check the keys before anything is loaded, and have checkpointing without reentry.

        Args:
            cfg: The configuration as the YAML has it.

        Raises:
            ValueError: For a key of SAP that is not known or is missing, for a value that is not
                accepted, and for an objective that is not the likelihood of answers.
        """
        for key in _OTHER_OBJECTIVES:
            if cfg.get(key):
                raise ValueError(
                    f"{key}: {cfg[key]} beside {type(self).__name__}, which trains on the "
                    "likelihood of answers; leave one of the two out"
                )
        known = SAPArgs.model_fields
        unknown = [key for key in cfg if str(key).startswith("sap_") and key not in known]
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: not known to {type(self).__name__}, which takes "
                f"{', '.join(known)}"
            )
        _settings(cfg)
        if cfg.get("gradient_checkpointing") and cfg.get("gradient_checkpointing_kwargs") is None:
            # Axolotl would have it reentrant, which finds no gradient where what enters the first
            # layer needs none.
            cfg["gradient_checkpointing_kwargs"] = {"use_reentrant": False}

    def get_input_args(self) -> str:
        """Return the name of the class that Axolotl checks the keys with."""
        return f"{SAPArgs.__module__}.{SAPArgs.__qualname__}"

    def get_trainer_cls(self, cfg: Any) -> type[Trainer]:
        """Return Axolotl's trainer, or the one that `trainer_cls` names, with SAP in front of it.

        Raises:
            TypeError: If `trainer_cls` is no `transformers.Trainer`.
        """
        # Not above: what that imports has to see all plugins.
        from axolotl.core.trainers import AxolotlTrainer

        base: type[Trainer] = AxolotlTrainer
        if cfg.get("trainer_cls"):
            from axolotl.utils.import_helper import get_cls_from_module_str

            base = get_cls_from_module_str(cfg["trainer_cls"])
            if not issubclass(base, Trainer):
                raise TypeError(
                    f"trainer_cls: {cfg['trainer_cls']} is no subclass of transformers.Trainer, "
                    "which SAP goes in front of"
                )
        return _with_sap(base, _settings(cfg), cfg.get("sequence_len"))

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Check that no other plugin chose the trainer.

        Raises:
            RuntimeError: One that comes before this one in `plugins` did.
        """
        if not isinstance(trainer, SAPTrainerMixin):
            raise RuntimeError(
                f"another plugin chose the trainer, {type(trainer).__name__}, and the run would be "
                f"without SAP: name {__name__}.{type(self).__name__} first in plugins, or leave "
                "the other one out"
            )


def _settings(cfg: Mapping[str, Any]) -> SAPSettings:
    """Return the settings of SAP in a configuration, checked.

    Raises:
        ValueError: For a key that is missing, a keyword or a value that is not known.
    """
    found = {key: cfg[key] for key in SAPArgs.model_fields if cfg.get(key) is not None}
    args = SAPArgs.model_validate(found)
    options = args.sap_options.model_dump(exclude_none=True) if args.sap_options else {}
    if options.get("safety_level") == "none":
        options["safety_level"] = None
    return SAPSettings(
        safety_dataset=args.sap_safety_dataset,
        method=args.sap_method,
        safety_batch_size=args.sap_safety_batch_size,
        safety_loss=args.sap_safety_loss,
        probe=args.sap_probe.model_dump(exclude_none=True) if args.sap_probe else {},
        sap_options=options,
    )


def _with_sap(base: type[Trainer], settings: SAPSettings, max_length: int | None) -> type[Trainer]:
    # mypy takes no class as a base that is first known here.
    class SAPAxolotlTrainer(SAPTrainerMixin, base):  # type: ignore[valid-type, misc]
        """A trainer of Axolotl with SAP, built with the arguments that Axolotl gives."""

        def __init__(self, *args: Any, processing_class: Any, **kwargs: Any) -> None:
            given = settings.trainer_arguments(processing_class, max_length)
            super().__init__(*args, processing_class=processing_class, **given, **kwargs)

        @property
        def _tokens_seen(self) -> dict[str, torch.Tensor]:
            """What `include_tkps` counts, as `compute_loss` begins it."""
            if not getattr(self.args, "include_tkps", False):
                raise AttributeError("nothing is counted")
            state: Any = self.state
            if not hasattr(state, "tokens"):
                state.tokens = {name: torch.zeros(1) for name in ("trainable", "total")}
            return state.tokens

        @_tokens_seen.setter
        def _tokens_seen(self, tokens: dict[str, torch.Tensor]) -> None:
            state: Any = self.state
            state.tokens = tokens

    return SAPAxolotlTrainer
