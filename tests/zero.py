"""Steps beside DeepSpeed's ZeRO on ranks, and the same steps without DeepSpeed on one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sap_fast import (
    BlendedAdamW,
    FusedSAP,
    ProbeSet,
    contrastive_loss,
    task_loss,
)
from tests.ranks import ROWS, share, whole_batch
from tests.tiny import problem

#: ε as large as the gradients, so that AdamW sees their size and rounding has no sign to turn.
LR, EPSILON = 5e-3, 1e-2
PROBE: dict[str, Any] = {"layers": [1, 2], "rho": 1e-2, "size": 0.05}
MICRO_BATCHES = 2


def configuration(stage: int, **settings: Any) -> dict[str, Any]:
    """What `deepspeed.initialize` is given."""
    zero = {"stage": stage} | settings.pop("zero", {})
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default DeepSpeed clips to 1
    } | settings


def closures(called: Any, step: int, rank: int | None, backward: Any) -> Any:
    """`task(part)` and `safety()` on the rows of a rank."""

    def task(part: list[Any]) -> Tensor:
        losses = []
        for rows in part:
            losses.append(task_loss(called, rows) / len(part))
            backward(losses[-1])
        return torch.stack([loss.detach() for loss in losses]).sum()

    def safety() -> Tensor:
        chosen, rejected = (share(whole_batch(step, kind), rank) for kind in (2, 3))
        loss = contrastive_loss(called, chosen, rejected)
        backward(loss)
        return loss

    return task, safety


def window(step: int, rank: int | None, micro_batches: int) -> list[Any]:
    """The micro-batches of a step: that many, each of a rank's rows."""
    return [share(whole_batch(step, 10 + k), rank) for k in range(micro_batches)]


def by_hand(
    lora: bool, steps: int, probe: dict[str, Any] | None, micro_batches: int = 1, **options: Any
) -> list[Tensor]:
    """The parameters after steps of this package's optimizer on all rows, on one rank."""
    tuned = problem(lora=lora).model
    trained = [p for p in tuned.parameters() if p.requires_grad]
    settings = {"lr": LR, "eps": EPSILON, "weight_decay": 0.1} | options
    optimizer = (
        BlendedAdamW(trained, **settings)
        if probe is None
        else FusedSAP(trained, ProbeSet(tuned, **probe), **settings)
    )
    for step in range(steps):
        task, safety = closures(tuned, step, None, Tensor.backward)
        batch = window(step, None, micro_batches)
        optimizer.inner_passes(task, safety, batch)
        with optimizer.task_pass() as record:
            record(task(batch))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in trained]


class Run:
    """An engine with ZeRO, and the passes beside it; none with `passes=False`."""

    def __init__(
        self,
        rank: int | None,
        stage: int,
        lora: bool,
        probe: dict[str, Any] | None = None,
        micro_batches: int = 1,
        passes: bool = True,
        config: dict[str, Any] | None = None,
        sharded_before: bool = False,
        **options: Any,
    ) -> None:
        import deepspeed

        from sap_fast.integrations.deepspeed import ZeroPasses

        self.rank, self.micro_batches = rank, micro_batches
        self._failure: tuple[int, BaseException] | None = None
        settings = {"gradient_accumulation_steps": micro_batches} | (config or {})
        settings = configuration(stage, **settings)
        self.model: nn.Module = problem(lora=lora).model
        if sharded_before:  # as models are that were made under zero.Init, by from_pretrained
            deepspeed.zero.Init(module=self.model, config_dict_or_path=settings)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        inner = torch.optim.AdamW(self.trained, lr=LR, eps=EPSILON, weight_decay=0.1, fused=True)
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=inner, config=settings)
        self.passes: Any = None
        if passes:
            probes = None if probe is None else ProbeSet(self.model, **probe)
            self.passes = ZeroPasses(self.engine, probes, **options)

    def step(self, number: int) -> None:
        def unscaled(loss: Tensor) -> None:
            self.engine.backward(loss, scale_wrt_gas=False)
            self._fail()

        task, safety = closures(self.engine, number, self.rank, unscaled)
        batch = window(number, self.rank, self.micro_batches)
        if self.passes is not None:
            self.passes.inner_passes(task, safety, batch)
        for rows in batch:
            with self.passes.task_pass() if self.passes else nullcontext(lambda _: None) as record:
                loss = task_loss(self.engine, rows)
                self.engine.backward(loss)
                record(loss)
            self.engine.step()

    def fails_after(self, backward: int, error: BaseException) -> None:
        """Raise an error once, after that many backward passes of inner passes."""
        self._failure = backward, error

    def _fail(self) -> None:
        if self._failure is not None:
            left, error = self._failure
            self._failure = (left - 1, error) if left > 1 else None
            if left == 1:
                raise error

    def masters(self, steps: int) -> list[Tensor]:
        """The trained parameters after some steps, in the precision that they are trained in."""
        from deepspeed.utils import safe_get_full_fp32_param

        self.run(steps)
        return [safe_get_full_fp32_param(p).clone() for p in self.trained]

    def weights(self) -> list[Tensor]:
        """The trained parameters, whole."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(self.trained):
            return [p.detach().clone() for p in self.trained]

    def run(self, steps: int) -> list[Tensor]:
        for step in range(steps):
            self.step(step)
        return self.weights()
