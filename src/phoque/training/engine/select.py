"""How the layers of a run are going to run: the fastest way that fits, pays, and agrees with the plain layers."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from phoque.data.chat_template import Encoded
from phoque.data.packing import Packing, packed
from phoque.training.engine.cuda_graphs import Row
from phoque.training.engine.engine import FRUGAL, Engine

SHARE_COMPILED = 0.3  # of a captured step's time, which compiling saves: benchmarks/train_speed.py
COMPILING_S = 15.0
AGREES, AGREES_FP8 = 0.15, 0.5  # largest relative difference of hidden states that rounding explains (FP8: 0.3 seen)


@dataclass(frozen=True)
class EngineChoice:
    """How the layers of a run are going to run, and why; `engine`, built in `seconds`, is None for the plain layers."""

    mode: str
    reason: str
    engine: Engine | None = None
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """What run.json keeps of it."""
        found: dict[str, Any] = {"mode": self.mode, "reason": self.reason}
        if self.engine:
            found |= {"recomputed_layers": self.engine.recomputed, "build_s": round(self.seconds, 1)}
        return found


def choose(model: Any, asked: str, packing: Packing, rows: int, recompute: bool) -> EngineChoice:
    """The way to run the layers that was `asked` for, or for `auto` the one that pays over `rows` rows.

    It is built and tried on a row before the first step: what fails, or differs from the plain layers by more than
    rounding, gives way to the next simpler one. Raises PhoqueError (2) if a row does not fit the memory even so.
    """
    cuda = next(model.parameters()).is_cuda
    if asked == "eager" or (asked == "auto" and not cuda):
        why = "as asked" if asked == "eager" else "on a CPU the products take the time, however they are called"
        return EngineChoice("eager", why)
    begun = time.monotonic()
    engine, row, real = Engine(model, several=packing.exact), *_trial_row(model, packing)
    reasons = _begin(engine, row, asked, packing, rows, recompute)
    while failed := _fitted(engine, row, real, recompute, reasons):
        reasons.append(f"{engine.mode} failed: {failed}")
        engine.forget()
        if not (engine.compiled or engine.captured):
            engine.undo()
            return EngineChoice("eager", "; ".join(reasons))
        engine.compiled, engine.captured = engine.compiled and engine.captured, False
    seconds = time.monotonic() - begun
    if cuda:
        torch.cuda.empty_cache()  # of what the trial alone took
    if engine.recomputed:
        reasons.append(f"{engine.recomputed} of {len(engine.layers)} layers are recomputed")
    return EngineChoice(engine.mode, "; ".join(reasons), engine, seconds)


def _begin(engine: Engine, row: Row, asked: str, packing: Packing, rows: int, recompute: bool) -> list[str]:
    """Set the engine to the fastest way that may do; return the reasons."""
    reasons, cuda = [], row.ids.is_cuda
    if asked == "graph" and not cuda:
        asked = "compile"
        reasons.append("there is no CUDA graph on a CPU")
    # a graph for each length would hold the activations of each
    engine.captured = cuda and asked != "compile" and not (packing.exact and asked == "auto")
    if cuda and not recompute and engine.has_room_for_whole(row):
        engine.hold(whole=True)
        reasons.append("there is room to keep the weights whole")
    if asked == "auto":
        saved = SHARE_COMPILED * engine.layer_seconds(row) * len(engine.layers) * rows
        engine.compiled = saved > COMPILING_S
        reasons.append(f"compiling would save {saved:,.0f} s of this run and take about {COMPILING_S:.0f}")
    else:
        engine.compiled = True
        reasons.append("as asked")
    return reasons


def _fitted(engine: Engine, row: Row, real: int, recompute: bool, reasons: list[str]) -> str | None:
    """Make the engine keep no more than fits, and try it on the row; return what went wrong, or None."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        engine.recomputed = engine.layers_to_recompute(row) if row.ids.is_cuda else 0
        if recompute:
            engine.recomputed = len(engine.layers)
        elif engine.recomputed and engine.compiled and not engine.frugal:
            engine.be_frugal()
            engine.recomputed = engine.layers_to_recompute(row)
            reasons.append(FRUGAL)
        difference = _difference(engine, row, real, reasons)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TorchDynamoException) as error:
        return " ".join(str(error).split())[:120] or type(error).__name__
    if difference <= (AGREES_FP8 if engine.in_fp8 else AGREES):
        return None
    return f"hidden states differ by {difference:.1%} from the plain layers'"


def _difference(engine: Engine, row: Row, real: int, reasons: list[str]) -> float:
    """How far the engine is from the plain layers, with less kept each time that memory runs out all the same.

    Raises torch.OutOfMemoryError once there is nothing left to spare.
    """
    while True:
        try:
            return engine.difference(row, real)
        except torch.OutOfMemoryError as error:
            ran_out = error.with_traceback(None)  # which would hold on to all that the pass had made so far
        if not (spared := engine.spare()):
            raise ran_out
        reasons.append(f"memory ran out in a trial: {spared}")


def _trial_row(model: Any, packing: Packing) -> tuple[Row, int]:
    """A row of the run's own shape, of conversations of average length and random tokens, and how many are real."""
    total = packing.tokens if not packing.exact else min(2 * packing.tokens, packing.count * packing.longest)
    core, length = model.get_base_model(), min(packing.longest, max(2, round(packing.mean)))
    ids = torch.randint(core.config.vocab_size, (total,), generator=torch.Generator().manual_seed(0)).tolist()
    talks = [Encoded(ids[at : at + length], ids[at : at + length]) for at in range(0, total - length + 1, length)]
    talks = talks[: packing.count if packing.exact else packing.most]
    real = sum(len(talk.ids) for talk in talks)
    row = Row.of(**packed(talks, packing.shape(total)))
    return Row(*(t.to(model.device) for t in row.tensors), row.longest), real
