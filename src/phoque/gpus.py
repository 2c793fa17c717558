"""What is known of GPUs by name: how fast a large matrix product runs on them, and what they draw at most."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`tflops` is the dense bf16 TFLOP/s (T4: fp16) of a large matrix product, None if not known; `watts` the limit."""

    tflops: int | None
    watts: int


GPUS = {
    "T4": Gpu(40, 70),
    "L4": Gpu(75, 72),
    "A10": Gpu(None, 150),
    "A10G": Gpu(65, 300),
    "A100": Gpu(250, 400),
    "L40S": Gpu(250, 350),
    "H100": Gpu(790, 700),
    "H200": Gpu(790, 700),
    "RTX PRO 6000": Gpu(350, 600),
}


def find_generation(name: str) -> str:
    """The key of GPUS for a GPU as torch or the Hub calls it ("NVIDIA A10G", "Nvidia L4"); empty if it has none."""
    return next((key for key in GPUS if re.search(rf"\b{key}\b", name)), "")
