"""Rules of blending: from three numbers to the coefficient c of g′ = g + c·d.

The numbers are ‖g‖², ⟨g, d⟩ and ‖d‖², of the task gradient g and the safety gradient d; d goes up
the safety loss, and the optimizer goes down g′. They stay on the device, as 0-d tensors, so every
rule runs in the same fused kernel and the host never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

#: (‖g‖², ⟨g, d⟩, ‖d‖²) → c, each 0-d.
RuleFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
Rule = Literal["blend", "project", "floor"] | RuleFunction


def blend(weight: float) -> RuleFunction:
    """Return c = γ‖g‖/‖d‖: γ of the gradient's own length is added along d."""
    return lambda g_square, g_dot_d, d_square: weight * g_square.sqrt() / d_square.sqrt()


def project(weight: float) -> RuleFunction:
    """Return c = −min(0, ⟨g, d⟩)/‖d‖²: the part of g that points at harm is removed.

    SafeGrad (Yi et al., arXiv:2508.07172), after PCGrad (Yu et al., arXiv:2001.06782). `weight` has
    no part in it.
    """
    return lambda g_square, g_dot_d, d_square: -g_dot_d.clamp(max=0.0) / d_square


def floor(weight: float) -> RuleFunction:
    """Return the smallest c ≥ 0 with ⟨g′, d⟩/‖d‖ ≥ γ‖g‖.

    Steps that go down the safety loss fast enough by themselves are left alone. The nearest here to
    the threshold of SPARD (arXiv:2605.28030).
    """

    def coefficient(g_square: Tensor, g_dot_d: Tensor, d_square: Tensor) -> Tensor:
        missing = weight * g_square.sqrt() - g_dot_d / d_square.sqrt()
        return missing.clamp(min=0.0) / d_square.sqrt()

    return coefficient


RULES = {"blend": blend, "project": project, "floor": floor}


def find_rule(rule: Rule, weight: float) -> RuleFunction:
    """Return the function of a rule.

    Args:
        rule: a name of `RULES`, or the function itself.
        weight: γ.

    Raises:
        ValueError: for an unknown name.
    """
    if callable(rule):
        return rule
    if rule not in RULES:
        raise ValueError(
            f"rule={rule!r} is not known; choose one of {', '.join(RULES)}, or give a function "
            "(‖g‖², ⟨g, d⟩, ‖d‖²) → coefficient of d"
        )
    return RULES[rule](weight)


def squared_norm(g_square: Tensor, g_dot_d: Tensor, d_square: Tensor, c: Tensor) -> Tensor:
    """Return ‖g + c·d‖² from its parts: no buffer holds the sum before the update.

    Where c·d takes nearly all of g away, rounding may leave less than nothing of it.
    """
    square = g_square + 2 * c * g_dot_d + (c * d_square.sqrt()).square()
    return square.clamp(min=0.0)
