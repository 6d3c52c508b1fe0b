"""Which safety rows a pass sees."""

from __future__ import annotations

from typing import Any

import torch

# Long enough to sort well, short enough that batches differ from round to round (transformers'
# length-grouped sampler sorts up to 50 batches).
_BATCHES_SORTED_TOGETHER = 16


class SafetyBatches:
    """The rows of every safety pass: all rows in random order, again and again.

    The rows of pass t follow from the seed and t alone, so that a resumed run needs no saved
    position to go on with the rows it would have had. Rows of about the same length come together,
    for less padding, where the dataset has rows as `sap_fast.data.load_safety_dataset` makes them.

    Args:
        dataset: safety rows, indexable.
        batch_size: rows per safety pass and rank.
        seed: seed of the order.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int) -> None:
        if len(dataset) == 0:
            raise ValueError("safety_dataset is empty; give at least one row")
        if batch_size < 1:
            raise ValueError(f"safety_batch_size={batch_size} is out of range; give a number ≥ 1")
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._round = (-1, 0)
        self._order: list[int] = []

    def rows(self, step: int, rank: int = 0, ranks: int = 1) -> list[Any]:
        """Return the rows that `rank` of `ranks` sees in safety pass number `step`."""
        together = self._batch_size * ranks
        first = step * together + rank * self._batch_size
        return [self._dataset[self._index(first + k, together)] for k in range(self._batch_size)]

    def _index(self, position: int, together: int) -> int:
        round_, place = divmod(position, len(self._dataset))
        if self._round != (round_, together):
            generator = torch.Generator().manual_seed(self._seed + round_)
            order = torch.randperm(len(self._dataset), generator=generator).tolist()
            self._order = self._by_length(order, together, generator)
            self._round = round_, together
        return self._order[place]

    def _by_length(self, order: list[int], together: int, generator: torch.Generator) -> list[int]:
        """Sort stretches of a random order by length, and shuffle the batches they make up."""
        stretch = _BATCHES_SORTED_TOGETHER * together
        batches: list[list[int]] = []
        for start in range(0, len(order), stretch):
            rows = sorted(order[start : start + stretch], key=lambda row: self._length(row))
            cut = [rows[k : k + together] for k in range(0, len(rows), together)]
            batches += [cut[k] for k in torch.randperm(len(cut), generator=generator).tolist()]
        return [row for batch in batches for row in batch]

    def _length(self, index: int) -> int:
        row = self._dataset[index]
        try:
            return max(len(row[answer]["input_ids"]) for answer in ("chosen", "rejected"))
        except (TypeError, KeyError):
            return 0  # rows of a form that only their collator knows
