"""The state of torch's random number generators, to be put back later."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class RandomState:
    """The state of torch's CPU generator and of the generator of every device in `devices`."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = {
            device: torch.get_device_module(device).get_rng_state(device) for device in devices
        }

    def restore(self) -> None:
        """Put the generators back into this state."""
        torch.set_rng_state(self._cpu)
        for device, state in self._devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
