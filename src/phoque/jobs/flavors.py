"""The hardware of HF Jobs: its names, prices and GPU memory, as the Hub lists them."""

import difflib
import re
from dataclasses import dataclass
from typing import Any

from phoque.errors import UsageError
from phoque.hub.client import Hub

HOURS = {"second": 1 / 3600, "minute": 1 / 60, "hour": 1.0, "day": 24.0}  # in one unit of the Hub's prices


@dataclass(frozen=True)
class Flavor:
    """A hardware flavor: dollars per hour, GPUs with their model, and the GPU memory of one card in GB."""

    name: str
    title: str
    dollars_per_hour: float
    gpus: int
    gpu_model: str
    gpu_memory_gb: float

    def describe(self) -> str:
        """One line for a dry run."""
        gpus = f", {self.gpus} x {self.gpu_memory_gb:g} GB" if self.gpus else ", no GPU"
        return f"{self.name} ({self.title}{gpus}), ${self.dollars_per_hour:.2f} per hour"


def dollars_per_hour(hardware: Any) -> float:
    """The price that the Hub lists. Raises UsageError for a unit of time that phoque does not know."""
    unit = hardware.unit_label.removesuffix("s")
    if unit not in HOURS:
        raise UsageError(
            what=f"The price of {hardware.name} cannot be read.",
            why=f"The Hub gives it per {hardware.unit_label}.",
            fix="Update phoque; `hf jobs hardware` lists the prices.",
        )
    return hardware.unit_cost_usd / HOURS[unit]


def find_flavor(hub: Hub, name: str) -> Flavor:
    """The flavor of this name. Raises UsageError naming the nearest one if there is none."""
    listed = hub.retry("listing the hardware", hub.api.list_jobs_hardware)
    for hardware in listed:
        if hardware.name == name:
            return _read_flavor(hardware)
    names = [hardware.name for hardware in listed]
    near = difflib.get_close_matches(name, names, 1, 0.5)
    raise UsageError(
        what=f"There is no hardware flavor {name!r}.",
        why=f"The Hub offers {', '.join(names)}.",
        fix=f"Did you mean {near[0]}?" if near else "Choose one of them.",
    )


def _read_flavor(hardware: Any) -> Flavor:
    accelerator = hardware.accelerator
    gpus = int(accelerator.quantity) if accelerator else 0
    memory = float(re.sub(r"[^\d.]", "", accelerator.vram) or 0) if accelerator else 0.0
    return Flavor(
        name=hardware.name,
        title=hardware.pretty_name,
        dollars_per_hour=dollars_per_hour(hardware),
        gpus=gpus,
        gpu_model=accelerator.model if accelerator else "",
        gpu_memory_gb=memory / max(1, gpus),  # the Hub tells the memory of all cards together
    )
