"""What a table of results has to satisfy: figures that were promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

Row = Mapping[str, Any]


class Claim(NamedTuple):
    """One figure that was promised."""

    claim: str
    where: str
    value: float
    relation: str
    target: float

    @property
    def met(self) -> bool:
        """Whether the figure keeps the promise."""
        return self.value <= self.target if self.relation == "≤" else self.value >= self.target


def claims_table(claims: Sequence[Claim]) -> Table:
    """Return a table to print."""
    table = Table("claim", "where", "figure", "target", "met", title="The claims")
    for claim in claims:
        target = f"{claim.relation} {claim.target:g}"
        met = "yes" if claim.met else "no"
        table.add_row(claim.claim, claim.where, f"{claim.value:.3g}", target, met)
    return table


# ---- benchmarks.before_after ----

#: Of time and memory, by a change that is not to cost any.
MOST_OVER_BEFORE = 1.03


def before_after_claims(table: Sequence[Row]) -> list[Claim]:
    """Return that no step takes more time or memory than before, to 3 %."""
    return [
        Claim(
            f"{what}: after ÷ before",
            f"{row['method']} {row['setup']} {row['batch']} {row['dtype']}",
            row[f"{what}_ratio"],
            "≤",
            MOST_OVER_BEFORE,
        )
        for what in ("time", "tensors")
        for row in table
    ]
