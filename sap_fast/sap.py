"""FusedSAP: Safety-Aware Probing (arXiv:2505.16737) as a `torch.optim.Optimizer`.

To follow a step through the code: `FusedSAP.step` (here and in `optimizer`) hands the closures to
`step.passes`, whose `inner_passes` is Algorithm 1 of the paper; the probe is in `model.probes`, and
what every kernel computes is in `ops.reference`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sap_fast.model.probes import ProbeSet
from sap_fast.optimizer import BlendedAdamW
from sap_fast.step.rules import Rule


class FusedSAP(BlendedAdamW):
    """AdamW on gradients taken under the safety probe of SAP.

    In every step a safety pass finds the safety gradient d, two probe passes at W ± ΔW (ΔW along d)
    find the probe V, and the task gradient is taken under V, so that the update leans away from
    harm. A step takes about three times as long as AdamW's. It is used as `BlendedAdamW` is:

        optimizer = FusedSAP(model.parameters(), ProbeSet(model))
        optimizer.step(task, safety)

    Args:
        params: as for `BlendedAdamW`.
        probes: where the probe lives, how large it is, and how it is found.
        lr: as for `BlendedAdamW`, and so are those that follow.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        safety_weight: γ of the blending that may join the probe; 0, no blending, is the paper.
        safety_level: probe (and blend) only while L_safe is above this level; other steps are
            AdamW's, and their probe passes are left out, for which the host waits for the safety
            pass. None: every step probes, as in the paper.
        rule: how d is blended in, with a `safety_weight`.
        direction_every: take d anew every so many steps.
        max_grad_norm: clip the (blended) gradient to this global norm.
        backend: whose operations to use; see `sap_fast.ops`.
        grad_scaler: for fp16. h is divided by its scale, exactly where that is a power of two.

    Raises:
        TypeError: if `probes` is no `ProbeSet`.
        ValueError: for a setting out of range, or parameters that share nothing with the probed
            model.
        RuntimeError: if a backend is named that cannot run where the parameters are.
    """

    def __init__(
        self,
        params: ParamsT,
        probes: ProbeSet,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        safety_weight: float = 0.0,
        safety_level: float | Literal["auto"] | None = None,
        rule: Rule = "blend",
        direction_every: int = 1,
        max_grad_norm: float | None = None,
        backend: str = "auto",
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not isinstance(probes, ProbeSet):
            raise TypeError(
                f"probes={probes!r} is no ProbeSet: FusedSAP(params, ProbeSet(model)); without a "
                "probe use BlendedAdamW"
            )
        self._probe_set = probes
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            safety_weight=safety_weight,
            safety_level=safety_level,
            rule=rule,
            direction_every=direction_every,
            max_grad_norm=max_grad_norm,
            backend=backend,
            grad_scaler=grad_scaler,
        )
