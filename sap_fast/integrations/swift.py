"""SAP in ms-swift, for a file of its `--external_plugins`.

    from sap_fast.integrations.swift import register

    register(safety_dataset="pairs.jsonl")

Written for the interface of ms-swift 4.6. `docs/how-to/other-stacks.md` has the flags.
"""

from __future__ import annotations

import warnings
from typing import Any

from swift.trainers import Seq2SeqTrainer, TrainerFactory

from sap_fast.data import encode_prompt
from sap_fast.integrations.settings import SAPSettings
from sap_fast.integrations.trainer import SAPTrainerMixin
from sap_fast.losses import IGNORE_INDEX

#: The one task of `TrainerFactory` that trains on the likelihood of answers.
_TASK = "causal_lm"

_registered: SAPSettings | None = None


def register(safety_dataset: str, **settings: Any) -> None:
    """Have `swift sft` and `swift pt` train with SAP.

    Args:
        safety_dataset: a file of safety rows, as `sap_fast.data.load_safety_dataset` reads it. The
            tokenizer's own chat template encodes them.
        **settings: the other fields of `sap_fast.integrations.settings.SAPSettings`: `method`
            (`"blend"` if it is left out), `safety_batch_size`, `safety_loss`, `probe`,
            `sap_options`.

    Raises:
        ValueError: for a value or a keyword that is not known.
    """
    global _registered
    _registered = SAPSettings(safety_dataset=safety_dataset, **settings)
    for task in TrainerFactory.TRAINER_MAPPING:
        trainer = SAPSeq2SeqTrainer if task == _TASK else NoSAPTrainer
        TrainerFactory.TRAINER_MAPPING[task] = f"{trainer.__module__}.{trainer.__qualname__}"


class NoSAPTrainer:
    """In the place of the trainers that SAP does not go in front of, so that none runs without."""

    def __init__(self, **_: Any) -> None:
        raise ValueError(
            "sap_fast.integrations.swift is registered, which trains on the likelihood of answers: "
            "swift sft and swift pt, with --task_type causal_lm. Leave it out of "
            "--external_plugins for other objectives"
        )


class SAPSeq2SeqTrainer(SAPTrainerMixin, Seq2SeqTrainer):
    """The trainer of `swift sft` with SAP, built with the arguments that ms-swift gives."""

    def __init__(self, *, args: Any, template: Any, **kwargs: Any) -> None:
        assert _registered is not None  # only `register` names this class
        if template.sequence_parallel_size > 1:
            raise ValueError(
                f"--sequence_parallel_size {template.sequence_parallel_size}: expected 1, as a "
                "probe and a safety pass see whole sequences"
            )
        if args.tuner_backend == "unsloth":
            raise ValueError(
                "--tuner_backend unsloth: expected peft, as Unsloth's own backward passes are not "
                "tried with SAP"
            )
        if args.gradient_checkpointing_kwargs is None:
            # ms-swift would have it reentrant on one device, which finds no gradient where what
            # enters the first layer needs none.
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        _warn_of_other_prompts(template)
        super().__init__(
            args=args,
            template=template,
            **_registered.trainer_arguments(template.tokenizer, template.max_length),
            **kwargs,
        )

    def _to_device(self, inputs: Any) -> Any:
        # ms-swift's `_prepare_inputs` cuts labels to the scored tokens, of task batches, and once.
        return self._prepare_input(inputs)

    def _find_other_update(self) -> str | None:
        args: Any = self.args
        if args.optimizer not in (None, "default"):
            return f"--optimizer {args.optimizer}"
        return super()._find_other_update()


def _warn_of_other_prompts(template: Any) -> None:
    """Warn where ms-swift's template and the tokenizer's write a question differently."""
    question = "Which is the highest mountain?"
    encoded = template.encode(
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "Everest"},
            ]
        }
    )
    scored = [label != IGNORE_INDEX for label in encoded["labels"]]
    prompt = encoded["input_ids"][: scored.index(True)]
    ours = encode_prompt(template.tokenizer, question)
    if prompt[: len(ours)] != ours:
        decode = template.tokenizer.decode
        warnings.warn(
            "task rows are written with ms-swift's template, safety rows with the tokenizer's, and "
            f"they differ: {decode(prompt)!r} and {decode(ours)!r}. Choose the --template and the "
            "--system that the model was aligned with",
            stacklevel=3,
        )
