"""What is compared: the base model and the updated one, a control, and the base itself in other numbers."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from phoque.errors import PhoqueError
from phoque.inference.residual_stream import blocks, inner


class ModelVariants:
    """One base model whose adapters `tuned` and `control` are switched, or two models that stand side by side."""

    def __init__(self, base: Any, updated: Any = None) -> None:
        self.model, self.updated = base, updated

    @contextmanager
    def on(self, name: str) -> Generator[Any]:
        """The model of one side: base, tuned, control or dtype."""
        if name == "tuned" and self.updated is not None:
            yield self.updated
        elif name in ("tuned", "control"):
            self.model.set_adapter(name)
            yield self.model
        else:
            with _plain(self.model), _other_numbers(self.model, name == "dtype"):
                yield self.model


@contextmanager
def _plain(model: Any) -> Generator[None]:
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


@contextmanager
def _other_numbers(model: Any, wanted: bool) -> Generator[None]:
    """The same weights computed in another precision: fp32 where they are 16 bits wide, else bf16."""
    if not wanted:
        yield
        return
    own = [p for n, p in model.named_parameters() if p.is_floating_point() and "lora_" not in n and _plain_weight(p)]
    packed = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    held, other = inner(model).dtype, torch.float32
    if held == torch.float32:
        other = torch.bfloat16
    before = [p.data for p in own] if other == torch.bfloat16 else []  # wider numbers lead back by themselves
    for p in own:
        p.data = p.data.to(other)
    for module in packed:
        module.compute_dtype = other
    try:
        yield
    finally:
        for n, p in enumerate(own):
            p.data = before[n] if before else p.data.to(held)
        for module in packed:
            module.compute_dtype = held


def _plain_weight(parameter: Any) -> bool:
    return type(parameter).__name__ != "Params4bit"


def refuse_strangers(base: Any, updated: Any, name: str) -> None:
    """Raise PhoqueError (2) for an updated model of another shape: its features would be compared by their numbers."""
    for what, one, other in (
        ("decoder blocks", len(blocks(base)), len(blocks(updated))),
        ("numbers a token in its residual stream", inner(base).config.hidden_size, inner(updated).config.hidden_size),
        ("tokens in its vocabulary", inner(base).config.vocab_size, inner(updated).config.vocab_size),
    ):
        if one != other:
            raise PhoqueError(
                f"{name} is no fine-tune of the base model.",
                f"It has {other} {what}, the base {one}.",
                "Compare a model with the base that it was made from.",
            )
