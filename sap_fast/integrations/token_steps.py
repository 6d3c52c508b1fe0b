"""Steps of about as many scored tokens each, rather than of as many rows.

The rows of an epoch are shuffled and cut into steps; the rows of a step make as many micro-batches
as they need. The loss of a step is divided by its scored tokens, so that where each step has about
as many of them, each token weighs about the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, TrainingArguments

from sap_fast.losses import IGNORE_INDEX

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def scored_tokens(row: dict[str, Any]) -> int:
    """Returns how many tokens of a row are scored; the first one never is, as nothing is before."""
    return sum(label != IGNORE_INDEX for label in row["labels"][1:])


class StepSampler(Sampler[list[int]]):
    """Yields the rows of one step after the other, in an order that each epoch draws anew.

    An epoch has as many steps as leave each the closest to `tokens`, the same number in every
    epoch. They are cut where the tokens so far come closest to equal shares, so no step is a small
    rest.

    The steps of several ranks are those of one, shared out. Each rank has as many rows, since it
    has to run as many forwards as the others: where there are too few, some get a row again to be
    read and not scored, of the index −1 − row.

    Args:
        counts: Scored tokens of each row.
        tokens: Scored tokens of a step, of all ranks together.
        seed: Of the order; that of an epoch follows from it.
        epoch: Tells the number of the epoch that begins, from 0.
        rank: Of this process.
        ranks: How many there are.

    Raises:
        ValueError: `tokens` is below 1.
    """

    def __init__(
        self,
        counts: Sequence[int],
        tokens: int,
        *,
        seed: int,
        epoch: Callable[[], int],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if tokens < 1:
            raise ValueError(f"tokens={tokens}; expected at least 1 scored token per step")
        self._counts, self._seed, self._epoch = counts, seed, epoch
        self._rank, self._ranks = rank, ranks
        self._steps = max(1, min(round(sum(counts) / tokens), len(counts)))

    def __len__(self) -> int:
        """Returns the steps of an epoch."""
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        order = torch.randperm(len(self._counts), generator=generator).tolist()
        so_far = torch.tensor([self._counts[row] for row in order]).cumsum(0)
        start = 0
        for step in range(1, self._steps + 1):
            left = self._steps - step
            nearest = (so_far - so_far[-1] * step / self._steps).abs().argmin()
            # A row of more tokens than a step is to have must not leave another step without one.
            end = min(max(int(nearest) + 1, start + 1), len(order) - left) if left else len(order)
            rows = order[start:end]
            again = [-1 - row for row in rows[: -len(rows) % self._ranks]]
            while (len(rows) + len(again)) % self._ranks:
                again.append(-1 - rows[0])
            yield [*rows, *again][self._rank :: self._ranks]
            start = end


class _Rows(Dataset[Any]):
    """Rows by the indices that `StepSampler` yields."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        if index >= 0:
            return self._rows[index]
        row = self._rows[-1 - index]
        return {**row, "labels": [IGNORE_INDEX] * len(row["labels"])}


class TokenStepsMixin(_Base):
    """Put in front of a `Trainer` class: its steps have about as many scored tokens each.

    `per_device_train_batch_size` is the number of rows of a micro-batch, and a step has as many
    micro-batches as its rows need. To the trainer each step is one batch. On several ranks a step
    has the rows that it has on one, shared out.

    Args:
        *args: as for the trainer.
        tokens_per_step: Scored tokens of a step, of all ranks together.
        **kwargs: as for the trainer, with a data set that has a length, whose rows have `labels`.

    Raises:
        ValueError: `gradient_accumulation_steps` says something else.
    """

    def __init__(self, *args: Any, tokens_per_step: int, **kwargs: Any) -> None:
        self._tokens_per_step = tokens_per_step
        super().__init__(*args, **kwargs)
        steps = self.args.gradient_accumulation_steps
        if steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={steps} with tokens_per_step={tokens_per_step}, from "
                "which the micro-batches of a step follow; expected 1"
            )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches of one step each: lists of micro-batches."""
        # Not prepared by Accelerate, which would share out what is shared out already.
        return DataLoader(
            _Rows(self.train_dataset),
            batch_sampler=self._sampler(),
            collate_fn=self._micro_batches,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return how many rows a step has on average, from which speeds are reckoned."""
        rows: Any = self.train_dataset
        return round(len(rows) / len(self._sampler()))

    def _sampler(self) -> StepSampler:
        rows: Any = self.train_dataset
        sampler = StepSampler(
            [scored_tokens(row) for row in rows],
            self._tokens_per_step,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            # Every epoch has as many steps.
            epoch=lambda: self.state.global_step // len(sampler),
            rank=self.args.process_index,
            ranks=self.args.world_size,
        )
        return sampler

    def _micro_batches(self, rows: list[Any]) -> list[Any]:
        size = self.args.per_device_train_batch_size
        collate: Any = self.data_collator
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetch the next step, as one batch, and count what is scored in all its micro-batches."""
        micro_batches = next(epoch_iterator, None)
        if micro_batches is None:
            return [], None
        number = len(micro_batches)
        samples, items = super().get_batch_samples(iter(micro_batches), number, device)
        return [samples], items

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run the step's micro-batches one after the other, and return the sum of their losses."""
        # What a loss is divided by that no number of items scales.
        self.current_gradient_accumulation_steps = len(inputs)
        losses = []
        for micro_batch in inputs[:-1]:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, micro_batch, num_items_in_batch))
        losses.append(super().training_step(model, inputs[-1], num_items_in_batch))
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: Any) -> int:
        """Return those of all micro-batches of a step."""
        return sum(super(TokenStepsMixin, self).floating_point_ops(batch) for batch in inputs)
