"""Packing for flash attention: all sequences in one row, with their bounds instead of a mask."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss
from tests.losses.helpers import ANSWERS, BATCHES, assert_same, batch_of, build, gradients
from tests.losses.test_packable import mistral

NAME = "flash_attention_in_torch"


class FlashInTorch:
    """What `flash_attn_varlen_func` computes, by SDPA for each sequence; checks what it is told."""

    def __init__(self) -> None:
        self.bounds: list[list[int]] = []
        self.deaf = False

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        rows, heads, length, _ = query.shape
        spans = [(row, 0, length) for row in range(rows)]
        if cu_seq_lens_q is not None:
            assert rows == 1 and attention_mask is None and cu_seq_lens_k is not None
            assert cu_seq_lens_q.dtype == torch.int32 and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
            bounds = cu_seq_lens_q.tolist()
            assert bounds[0] == 0 and bounds[-1] == length and bounds == sorted(set(bounds))
            longest = max(last - first for first, last in pairwise(bounds))
            assert type(max_length_q) is int and max_length_q == max_length_k == longest
            self.bounds.append(bounds)
            if not self.deaf:
                spans = [(0, first, last) for first, last in pairwise(bounds)]
            if len(bounds) > 2 and position_ids is not None:
                expected = [torch.arange(last - first) for first, last in pairwise(bounds)]
                assert torch.equal(position_ids[0], torch.cat(expected))
        elif attention_mask is not None:
            assert attention_mask.shape == (rows, length)
            kept = [row.nonzero()[:, 0].tolist() for row in attention_mask]
            spans = [(row, places[0], places[-1] + 1) for row, places in enumerate(kept)]
        outputs = torch.zeros_like(query)
        for row, first, last in spans:
            place = torch.arange(last - first)
            distance = place[:, None] - place
            visible = distance >= 0
            if sliding_window is not None:
                visible &= distance < sliding_window
            parts = [
                each[row : row + 1, :, first:last].repeat_interleave(heads // each.shape[1], 1)
                for each in (query, key, value)
            ]
            attended = F.scaled_dot_product_attention(*parts, attn_mask=visible, scale=scaling)
            outputs[row, :, first:last] = attended[0]
        return outputs.transpose(1, 2), None


@pytest.fixture
def flash() -> Iterator[FlashInTorch]:
    attention = FlashInTorch()
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    yield attention
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping[NAME]


MODELS = {
    "llama": build,
    # Shorter than the sequences: a mask of ours would have to know of it, and flash attention does.
    "window": lambda **settings: mistral(sliding_window=4, **settings),
}


def on_flash(model: Any) -> Any:
    """Put a model on the attention of this file; transformers would look for its name in a hub."""
    model.config._attn_implementation = NAME
    return model


@pytest.mark.usefixtures("no_packing_refused")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_those_of_sdpa(
    kind: str, side: str, flash: FlashInTorch, forwards: list[Any]
) -> None:
    ours = on_flash(MODELS[kind]())
    theirs = MODELS[kind](attn_implementation="sdpa")
    batch = batch_of(ANSWERS, side=side)
    lengths = [len(answer) for answer in ANSWERS]
    loss, expected = task_loss(ours, batch), task_loss(theirs, batch, pack=False)
    assert forwards == [(1, sum(lengths))]
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert flash.bounds[-1] == bounds
    assert_same(loss, expected, rtol=2e-6)
    assert_same(gradients(loss, ours), gradients(expected, theirs))
    assert_same(loss, task_loss(ours, batch, pack=False), rtol=2e-6)

    pairs = batch_of(BATCHES["shared prefix"]), batch_of(BATCHES["branches of branches"] + [[5, 6]])
    assert_same(
        contrastive_loss(ours, *pairs), contrastive_loss(theirs, *pairs, pack=False), rtol=2e-6
    )
    assert len(forwards) == 2 and len(flash.bounds[-1]) == 11


@pytest.mark.usefixtures("no_packing_refused")
def test_a_batch_without_padding_is_left_as_it_is(flash: FlashInTorch, forwards: list[Any]) -> None:
    model, batch = on_flash(build()), batch_of(BATCHES["identical"])
    task_loss(model, batch)
    assert forwards == [None]
    tested = len(flash.bounds)
    task_loss(model, batch)
    assert len(flash.bounds) == tested


def test_attention_that_disregards_the_bounds_is_found(
    flash: FlashInTorch, forwards: list[Any]
) -> None:
    model, batch = on_flash(build(initializer_range=0.3)), batch_of(ANSWERS)
    flash.deaf = True
    with pytest.warns(UserWarning, match="the bounds of sequences changes log-probabilities by"):
        loss = task_loss(model, batch)
    assert forwards == []
    assert_same(loss, task_loss(model, batch, pack=False))


def test_attention_on_a_cache_in_pages_is_left_alone() -> None:
    from sap_fast.losses.packing import is_flash

    assert is_flash("flash_attention_2") and is_flash("kernels-community/flash-attn2")
    assert not any(map(is_flash, (None, "sdpa", "flex_attention", "paged|flash_attention_2")))


@pytest.mark.usefixtures("no_packing_refused")
def test_a_step_of_sap_finds_the_probe_gradient_of_sdpa(flash: FlashInTorch) -> None:
    found = []
    for model in (on_flash(build()).train(), build().train()):
        probes = ProbeSet(model, [0], rho=1e-3)
        optimizer = FusedSAP(model.parameters(), probes)
        batch, pairs = batch_of(ANSWERS), [batch_of(BATCHES["shared prefix"]), batch_of(ANSWERS)]

        def task(model: Any = model, batch: Any = batch) -> Tensor:
            loss = task_loss(model, batch)
            loss.backward()
            return loss

        def safety(model: Any = model, pairs: Any = pairs) -> Tensor:
            loss = contrastive_loss(model, *pairs)
            loss.backward()
            return loss

        optimizer.step(task, safety)
        found.append(probes.estimates[0])
    assert F.cosine_similarity(*found, dim=0) > 0.9999
