"""Devices without hardware."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainyard.service.devices.inventory import Device


@dataclass(frozen=True)
class FixedInventory:
    """Devices that never change."""

    fixed: tuple[Device, ...]

    def devices(self) -> Sequence[Device]:
        return self.fixed
