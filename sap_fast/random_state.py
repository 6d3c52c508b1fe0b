"""The state of torch's random number generators, to be put back later."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class RandomState:
    """The state of torch's CPU generator and of the generators of other devices.

    Args:
        devices: What has a generator of its own beside the CPU's. The CPU and the meta device may
            be among them: the one is always saved, the other has nothing to save.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Puts the generators back into this state."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
