"""The head, applied to the scored positions alone and a chunk at a time.

The model runs as it was given, wrappers included, while hooks on its output embeddings (the head)
keep the hidden states and let only the last position through: `HeadCall`. The head is then applied
to the scored positions in chunks. The gradient of a chunk is found with it, where it is known by
then what it will be multiplied by (a total) or where the head is frozen; else the chunk is computed
again in the backward pass.

A model's first use also tests that this gives the model's own logits. Where it does not, or can't,
an `UnknownHeadError` says why, and `sap_fast.losses.forward` takes the model's own logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sap_fast.configuration import text_config
from sap_fast.distributed import any_dtensor, is_fsdp2

# Bytes of one chunk's logits. Backward holds about four such tensors (logits, log-softmax, their
# gradients): 256 MiB, where the logits of 8 rows of 2,048 tokens at V=128,000 take 7.8 GiB alone.
# At that V a chunk still has 131 rows, so the head's weights are read once for many rows. A GPU
# needs more rows to be busy, and a trained head's gradient is read and written once per chunk: on
# an H100 AdamW's step on Llama-3.2-1B (benchmarks/gpu_step.py) took 1.13 times as long as with all
# logits at once in chunks of 64 MiB, and 0.99 times in chunks of 256 MiB.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


Score = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, V), targets (N, …)) → scores (N,), each of its own row."""


class UnknownHeadError(Exception):
    """Head and known post-processing do not give the model's logits; the message says why."""


_SHARDED_BY_ITSELF = (
    "its head is sharded by itself and gathered for the model's forward only; leave it to the "
    "fully_shard of the model"
)


def find_head(causal_lm: nn.Module, compiled: bool) -> nn.Module:
    """Returns the output embeddings of a causal LM, or raises `UnknownHeadError`.

    Args:
        causal_lm: The model inside its wrappers.
        compiled: Whether it, or a wrapper, is compiled.
    """
    get_head: Any = getattr(causal_lm, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None:
        raise UnknownHeadError("get_output_embeddings gives no head")
    if compiled or head._compiled_call_impl is not None:
        # Compiled code keeps the hooks that it was traced with and is blind to later ones: traced
        # with ours, it would return one position for ever.
        raise UnknownHeadError(
            "it is compiled, and compiled code can't be hooked (decoder layers that are compiled "
            "each by itself, layer.compile(), leave the head as it is)"
        )
    if any(hasattr(parameter, "ds_id") for parameter in head.parameters()):
        # The backward pass would find the head's weights let go of, when it runs the chunks again.
        raise UnknownHeadError(
            "its head is spread by ZeRO-3, and gathered for the model's own forward only"
        )
    if any(is_fsdp2(module) for module in head.modules()):
        # In a group with others, as Accelerate and torchtitan have it, the head may still be
        # gathered after the forward. But each chunk calls it, and with it the hooks of the group,
        # which reduce its gradients and free its weights after the first.
        raise UnknownHeadError(_SHARDED_BY_ITSELF)
    return head


def _post_process(config: Any, logits: Tensor) -> Tensor:
    """Does what known models do to their head's output, in the dtype in which they do it."""
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if factor := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and later
        logits = torch.tanh(logits / cap) * cap
    return logits


class HeadCall:
    """Context in which a model's head sees the last position only, and the head's input is kept.

    With `test`, the head's output is replaced by numbers from −64 to 64, for `check` to find again
    in the model's logits. The model's own can be too small (in a new model, zero) to show a softcap
    or a scale.

    Args:
        causal_lm: The model inside its wrappers, whose configuration tells the post-processing.
        head: Its output embeddings.
        shape: (batch, sequence) of what the model is given.
        test: Whether `check` is to compare the model's logits with what the chunks will do.
    """

    def __init__(
        self, causal_lm: nn.Module, head: nn.Module, shape: torch.Size, test: bool
    ) -> None:
        self.config = text_config(causal_lm)
        self.head = head
        self.shape = shape
        self.test = test
        self.calls = 0
        self.hidden: Tensor | None = None
        self.test_logits: Tensor | None = None

    def __enter__(self) -> Self:
        # First of the pre-hooks and last of the hooks: others act here as they do on the chunks.
        self._handles = (
            self.head.register_forward_pre_hook(self._before_head, prepend=True, with_kwargs=True),
            self.head.register_forward_hook(self._after_head),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_head(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        self.calls += 1
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if self.calls > 1 or not isinstance(hidden, Tensor) or hidden.shape[:-1] != self.shape:
            return None
        self.hidden = hidden
        # Accelerate opens autocast inside the model's forward; it is closed when the chunks run.
        device = hidden.device.type
        enabled = torch.is_autocast_enabled(device)
        self.autocast = device, torch.get_autocast_dtype(device), enabled
        # With the strides of a contiguous tensor, which contiguous() does not give to one row; or
        # matmul makes a bmm of it, with a copy of a frozen head's weights per row: 70 ms per pass
        # of SmolLM2-135M in bf16.
        last = hidden[:, -1:].clone(memory_format=torch.contiguous_format)
        return (last,), {}

    def _after_head(self, _: nn.Module, args: Any, output: Any) -> Any:
        if not self.test or not isinstance(output, Tensor):
            return None
        test_logits = torch.linspace(
            -64, 64, output.shape[-1], dtype=output.dtype, device=output.device
        )
        self.test_logits = test_logits.expand_as(output)
        # All of them, but with the head still in the graph that DDP searches for unused parameters.
        return torch.where(self.test_logits.isfinite(), self.test_logits, output)

    def check(self, logits: Tensor) -> tuple[Tensor, int]:
        """Returns the hidden states and V, or raises `UnknownHeadError` where `logits` differ."""
        if self.calls != 1:
            raise UnknownHeadError(f"its head ran {self.calls} times in one forward")
        if any_dtensor(self.head.parameters()):
            raise UnknownHeadError(_SHARDED_BY_ITSELF)
        if self.hidden is None:
            raise UnknownHeadError("its head does not take (batch, sequence, hidden) alone")
        if self.test:
            self._compare(logits)
        return self.hidden, logits.shape[-1]

    def _compare(self, logits: Tensor) -> None:
        if self.test_logits is None or self.test_logits.shape != logits.shape:
            raise UnknownHeadError(
                f"its logits {tuple(logits.shape)} are not of the shape of its head's output"
            )
        expected = _post_process(self.config, self.test_logits).to(logits)
        # The same operations give the same bits. Two units in the last place allow for a model that
        # rounds in another order or casts to fp32 earlier.
        tolerance = 2 * max(torch.finfo(x.dtype).eps for x in (self.test_logits, logits))
        if not torch.allclose(logits, expected, rtol=tolerance, atol=0.0):
            difference = (logits - expected).abs().max().item()
            raise UnknownHeadError(
                f"its logits differ by up to {difference:.3g} from its head's output after the "
                "post-processing known here"
            )

    def scores(
        self, rows: Tensor, targets: Tensor, vocabulary: int, total: bool, score: Score
    ) -> Tensor:
        """Returns the scores (N,) of targets (N, …) by rows (N, H), or their total."""
        self._score = score
        size = _chunk_size(rows, vocabulary)
        learns = torch.is_grad_enabled() and not _is_hooked(self.head)
        trained = {n: p for n, p in self.head.named_parameters() if p.requires_grad}
        if learns and not trained and rows.requires_grad:
            found = _FrozenHead.apply(rows, targets, size, self._chunk)
        elif learns and trained and total:
            names = tuple(trained)
            return _TotalOfHead.apply(rows, targets, size, self, names, *trained.values())
        else:
            found = recomputed(self._chunk, rows, targets, vocabulary, self.head)
        return found.sum() if total else found

    def _chunk(
        self, rows: Tensor, targets: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Returns the scores of rows, by the head's parameters or by others by name."""
        return self._score(self.logits(rows, parameters), targets)

    def logits(self, rows: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the logits (N, V) of rows (N, H), by the head's parameters or by others."""
        # Uncached, because chunks that share one bf16 copy of the weights add gradients in bf16.
        with torch.autocast(*self.autocast, cache_enabled=False):
            parameters = self._cast_parameters if parameters is None else parameters
            logits = functional_call(self.head, dict(parameters), (rows,))
            return _post_process(self.config, logits)

    def cast(self, parameter: Tensor) -> Tensor:
        """Returns a linear head's parameter as autocast casts it, and another head's as it is."""
        _, dtype, enabled = self.autocast
        if not enabled or not _is_plain_linear(self.head) or parameter.dtype == torch.float64:
            return parameter
        return parameter.to(dtype)

    @functools.cached_property
    def _cast_parameters(self) -> dict[str, Tensor]:
        """Casts a frozen linear head's parameters once, as autocast would for every chunk."""
        if not _is_plain_linear(self.head):
            return {}
        return {n: self.cast(p) for n, p in self.head.named_parameters() if not p.requires_grad}


def _is_plain_linear(head: nn.Module) -> bool:
    return type(head) is nn.Linear and "forward" not in vars(head)


def _is_hooked(head: nn.Module) -> bool:
    """Says whether there may be more in the head than its parameters, as hooks hold their own."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in head.modules())


def _chunk_size(rows: Tensor, vocabulary: int) -> int:
    itemsize = torch.promote_types(rows.dtype, torch.float32).itemsize
    chunk_bytes = CHUNK_BYTES.get(rows.device.type, CHUNK_BYTES["cuda"])
    return max(1, chunk_bytes // (vocabulary * itemsize))


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the log-probabilities (N,) of targets (N,) by logits (N, V), in fp32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets.to(logits.device), reduction="none")


class _FrozenHead(torch.autograd.Function):
    """Scores (N,) of rows (N, ·); their gradient is found with them, chunk by chunk.

    The score of a row depends on that row alone, so the gradient of the chunk's sum has
    in each row what backward has to multiply by the incoming gradient. Against computing the chunk
    again this saves the second run of the head, and keeps (N, H) instead of nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, targets: Tensor, size: int, scores: Callable[..., Tensor]
    ) -> Tensor:
        gradients, chunks = [], []
        for chunk in zip(rows.split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                leaf = chunk[0].detach().requires_grad_()
                chunk_scores = scores(leaf, chunk[1])
                gradients += torch.autograd.grad(chunk_scores.sum(), leaf)
            chunks.append(chunk_scores.detach())
        ctx.scores, ctx.targets = scores, targets
        ctx.save_for_backward(rows, torch.cat(gradients))
        return torch.cat(chunks)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        rows, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a second derivative needs the graph
            again = ctx.scores(rows, ctx.targets)
            (gradient,) = torch.autograd.grad(again, rows, incoming, create_graph=True)
            return gradient, None, None, None
        # `incoming` is fp32 or wider, and so is the product.
        product = gradient * incoming[:, None].to(gradient.device)
        return product.to(gradient.dtype), None, None, None


class _TotalOfHead(torch.autograd.Function):
    """Total score of rows (N, ·); all gradients are found with it, chunk by chunk.

    A total has one incoming gradient, so that those of the rows and of the head's parameters need
    only be multiplied by it: against computing the chunks again, a quarter of the head's work is
    saved. The parameters' gradients are kept from the forward on, added up in fp32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        targets: Tensor,
        size: int,
        call: HeadCall,
        names: tuple[str, ...],
        *parameters: Tensor,
    ) -> Tensor:
        totals, row_gradients = [], []
        sums: list[Tensor] = []
        leaves = [call.cast(p).detach().requires_grad_() for p in parameters]
        for chunk in zip(rows.split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                leaf = chunk[0].detach().requires_grad_()
                total = call._chunk(leaf, chunk[1], dict(zip(names, leaves, strict=True))).sum()
                row_gradient, *gradients = torch.autograd.grad(total, [leaf, *leaves])
            totals.append(total.detach())
            row_gradients.append(row_gradient)
            if not sums:
                sums = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
                continue
            for accumulated, gradient in zip(sums, gradients, strict=True):
                accumulated.add_(gradient)
        ctx.call, ctx.names, ctx.targets = call, names, targets
        ctx.save_for_backward(rows, torch.cat(row_gradients), *parameters, *sums)
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_gradient, *kept = ctx.saved_tensors
        parameters, sums = kept[: len(ctx.names)], kept[len(ctx.names) :]
        if torch.is_grad_enabled():  # create_graph: a second derivative needs the graph
            named = dict(zip(ctx.names, parameters, strict=True))
            total = ctx.call._chunk(rows, ctx.targets, named).sum()
            wanted = [tensor for tensor in (rows, *parameters) if tensor.requires_grad]
            found = iter(torch.autograd.grad(total, wanted, incoming, create_graph=True))
            gradients = [next(found) if t.requires_grad else None for t in (rows, *parameters)]
            return gradients[0], None, None, None, None, *gradients[1:]
        scaled = [
            (gradient * incoming.to(gradient.device)).to(like.dtype)
            for gradient, like in zip((row_gradient, *sums), (rows, *parameters), strict=True)
        ]
        return scaled[0], None, None, None, None, *scaled[1:]


def recomputed(
    scores: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor,
    targets: Tensor,
    vocabulary: int,
    head: nn.Module | None = None,
) -> Tensor:
    """Returns the scores (N,) of rows (N, ·) by chunks that run again in the backward.

    Args:
        scores: Gives them for a chunk of rows and targets.
        rows: Hidden states, or logits.
        targets: (N, …) what they are scored against.
        vocabulary: V, which sets the rows per chunk.
        head: What `scores` runs; None if the rows are logits.
    """
    size = _chunk_size(rows, vocabulary)
    # A plain linear layer draws no random numbers; LoRA's dropout on the head does.
    random = head is not None and type(head) is not nn.Linear
    chunks = zip(rows.split(size), targets.split(size), strict=True)
    return torch.cat(
        [checkpoint(scores, *c, use_reentrant=False, preserve_rng_state=random) for c in chunks]
    )
