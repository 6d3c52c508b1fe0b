"""Commands in several processes: ranks, as `torchrun` and `accelerate launch` start them.

`finetune` runs on every rank and ends with one result. Any other command runs on the first rank,
and the others leave. Only the first rank writes files, and only it speaks.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sap_fast.cli.console import UserError

T = TypeVar("T")

_ON_EVERY_RANK = ("finetune",)
_ON_ONE_PROCESS = {
    "compare": "it starts a process of its own for each run; start it without torchrun, or run "
    "sap-fast finetune --optimizer adamw, blend and sap on ranks",
}


def rank() -> int:
    """Returns the number of this process; 0 where it is the only one."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def count() -> int:
    """Returns how many processes the launcher started."""
    # One variable alone is not a launcher's: clusters set either for purposes of their own.
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1


def is_first() -> bool:
    """Returns whether this process writes and speaks."""
    return rank() == 0


def has_work(arguments: Sequence[str]) -> bool:
    """Returns whether this rank takes part in a command.

    Args:
        arguments: The command line, without the program.
    """
    shared = bool(arguments) and arguments[0] in _ON_EVERY_RANK
    return is_first() or (shared and not {"--help", "--print-config"} & set(arguments))


def note(arguments: Sequence[str]) -> str | None:
    """Returns what to say before a command that does not run on every rank, if anything.

    Raises:
        UserError: The command cannot run under a launcher.
    """
    command = arguments[0] if arguments else ""
    if count() == 1 or command in _ON_EVERY_RANK:
        return None
    if command in _ON_ONE_PROCESS:
        raise UserError(f"{command} on {count()} ranks: {_ON_ONE_PROCESS[command]}")
    return f"{command} runs on one rank; the other {count() - 1} leave"


@contextmanager
def joined() -> Iterator[None]:
    """Lets the ranks talk to each other in the body, on the accelerator if there is one."""
    if count() == 1 or dist.is_initialized():
        yield
        return
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available())
    yield
    # A wrapped model that is still there would talk on.
    gc.collect()
    dist.destroy_process_group()


def on_first(work: Callable[[], T]) -> T:
    """Runs `work` on the first rank, while the others wait; returns what it returned on each.

    Raises:
        UserError: It failed. On the first rank its own error is raised.
    """
    if count() == 1:
        return work()
    outcome: list[Any] = [None]
    failure: Exception | None = None
    if is_first():
        try:
            outcome = [(work(), None)]
        # Whatever it is: it is raised below, once the others have heard of it.
        except Exception as error:
            failure, outcome = error, [(None, str(error))]
    dist.broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    result, message = outcome[0]
    if message is not None:
        raise UserError(message)
    return result


def on_every(work: Callable[[], T]) -> T:
    """Runs `work` on every rank, and goes on only where it went well on all.

    Raises:
        UserError: It failed on another rank. Where it failed, its own error is raised.
    """
    if count() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    # Whatever it is: it is raised below, once the others have heard of it.
    except Exception as error:
        failure = error
    messages: list[str | None] = [None] * count()
    dist.all_gather_object(messages, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for number, message in enumerate(messages):
        if message is not None:
            raise UserError(f"on rank {number}: {message}")
    return result  # type: ignore[return-value]  # None only where it failed, or where T is None
