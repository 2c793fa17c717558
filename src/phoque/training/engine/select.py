"""Select how the layers run: the fastest mode that fits the memory, saves time and agrees with the plain layers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from phoque.data.chat_template import EncodedChat
from phoque.data.packing import Packing, build_batch
from phoque.errors import PhoqueError
from phoque.models.architectures import architecture_of
from phoque.training.engine.cuda_graphs import PackedRow
from phoque.training.engine.engine import POINTWISE_RECOMPUTED, Engine
from phoque.training.engine.trial import check_against_plain

COMPILE_SAVING = 0.3  # share of a captured step's time that compiling saves; see benchmarks/train_speed.py
COMPILE_SECONDS = 15.0


@dataclass(frozen=True)
class EngineChoice:
    """How the layers run, and why; `engine`, built in `seconds`, is None if the plain layers run."""

    mode: str
    reason: str
    engine: Engine | None = None
    seconds: float = 0.0

    @property
    def kernels(self) -> str:
        """The mode, and whether gated MLPs run as one operator: processes that differ in it round differently."""
        return self.mode + " with gated MLPs as one operator" * bool(self.engine and self.engine.fused_mlps)

    def record(self) -> dict[str, Any]:
        """Return the entry for run.json."""
        entry: dict[str, Any] = {"mode": self.mode, "reason": self.reason}
        if self.engine:
            entry |= {"recomputed_layers": self.engine.recomputed_layers, "layers": len(self.engine.layers)}
            entry["fused_mlps"] = self.engine.fused_mlps
            entry |= {"build_s": round(self.seconds, 1)}
        return entry


def select_engine(
    model: Any,
    requested: str,
    packing: Packing,
    rows: int,
    *,
    recompute: bool,
    previous: str = "",
    decide: Callable[[Callable[[], bool]], bool] = lambda choose: choose(),
) -> EngineChoice:
    """Build the engine for `requested` mode; `auto` selects the mode that saves time over `rows` rows.

    `previous` is the mode in which the run was trained so far on such a device: `auto` then selects it again. `decide`
    returns what process 0 chooses, where several processes measure.
    The engine runs one trial row before the first step. If it fails, or differs from the plain layers by more than
    rounding, the next simpler mode is tried. Raises UsageError if a row does not fit the memory in any mode.
    """
    on_gpu = next(model.parameters()).is_cuda
    if no_engine := architecture_of(model.get_base_model().config).no_engine:
        return EngineChoice("eager", f"plain layers: {no_engine}")
    if not has_equal_layers(model):
        return EngineChoice(
            "eager", "plain layers: --target-modules adapts other modules in some layers than in others"
        )
    if requested == "eager":
        return EngineChoice("eager", "as requested")
    if requested == "auto" and not on_gpu:
        return EngineChoice("eager", "a CPU is matmul-bound; compiling would not help")
    if requested == "auto" and previous == "eager":
        return EngineChoice("eager", "as before the resume")
    start = time.monotonic()
    engine, row, n_real = Engine(model, dynamic=packing.exact), *_trial_row(model, packing)
    reasons = _configure(
        engine,
        row,
        requested=requested,
        packing=packing,
        rows=rows,
        recompute=recompute,
        previous=previous,
        decide=decide,
    )
    while failure := _try_engine(engine, row, n_real, recompute, reasons):
        with_mlps = " with gated MLPs as one operator" * engine.fused_mlps
        reasons.append(f"{engine.mode}{with_mlps} failed: {failure}")
        engine.discard_compiled()
        if engine.fused_mlps:  # the same mode without them
            engine.set_fused_mlps(False)
            continue
        if not (engine.compiled or engine.captured):
            engine.restore_modules()
            return EngineChoice("eager", "; ".join(reasons))
        engine.compiled, engine.captured = engine.compiled and engine.captured, False
        engine.set_fused_mlps(engine.compiled)  # it may have been the graphs that failed
    if engine.fused_mlps:
        reasons.append("gated MLPs run as one operator")
    seconds = time.monotonic() - start
    if on_gpu:
        torch.cuda.empty_cache()  # memory that only the trial needed
    if engine.recomputed_layers:
        reasons.append(f"{engine.recomputed_layers} of {len(engine.layers)} decoder blocks are recomputed")
    return EngineChoice(engine.mode, "; ".join(reasons), engine, seconds)


def has_equal_layers(model: Any) -> bool:
    """Whether the adapter changes the same modules in every decoder layer, which the engine needs."""
    layers = model.get_base_model().model.layers
    adapted = [[name for name, module in layer.named_modules() if hasattr(module, "lora_A")] for layer in layers]
    return bool(adapted[0]) and all(names == adapted[0] for names in adapted)


def _configure(
    engine: Engine,
    row: PackedRow,
    *,
    requested: str,
    packing: Packing,
    rows: int,
    recompute: bool,
    previous: str,
    decide: Callable[[Callable[[], bool]], bool],
) -> list[str]:
    """Set the engine to the fastest mode worth trying; return the reasons."""
    reasons, on_gpu = [], row.ids.is_cuda
    if requested == "graph" and not on_gpu:
        requested = "compile"
        reasons.append("there are no CUDA graphs on a CPU")
    # with one graph per row length, each graph would keep its own activations
    engine.captured = on_gpu and requested != "compile" and not (packing.exact and requested == "auto")
    if on_gpu and not recompute and engine.has_room_for_weight_cache(row):
        engine.set_weight_cache(enabled=True)
        reasons.append("there is memory for the weight cache")
    if requested == "auto" and previous:
        engine.compiled, engine.captured = "compiled" in previous, "captured" in previous
        reasons.append("as before the resume")
    elif requested == "auto":
        saved_seconds = COMPILE_SAVING * engine.time_layer(row) * len(engine.layers) * rows
        engine.compiled = decide(lambda: saved_seconds > COMPILE_SECONDS)
        reasons.append(
            f"compiling would save {saved_seconds:,.0f} s in this run and take about {COMPILE_SECONDS:.0f} s"
        )
    else:
        engine.compiled = True
        reasons.append("as requested")
    engine.set_fused_mlps(engine.compiled)
    return reasons


def _try_engine(engine: Engine, row: PackedRow, n_real: int, recompute: bool, reasons: list[str]) -> str | None:
    """Set what the engine recomputes so that it fits the memory, and run the row; return what went wrong, or None."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        engine.recomputed_layers = engine.count_layers_to_recompute(row) if row.ids.is_cuda else 0
        if recompute:
            engine.recomputed_layers = len(engine.layers)
        elif engine.recomputed_layers and engine.compiled and not engine.recompute_pointwise:
            engine.enable_pointwise_recompute()
            engine.recomputed_layers = engine.count_layers_to_recompute(row)
            reasons.append(POINTWISE_RECOMPUTED)
        return _check_with_less_memory(engine, row, n_real, reasons) or None
    except (torch.OutOfMemoryError, PhoqueError):
        raise
    except Exception as error:
        # kernels of ours are compiled on this machine, which can fail in many ways
        if not (engine.fused_mlps or isinstance(error, RuntimeError | TorchDynamoException)):
            raise
        return " ".join(str(error).split())[:120] or type(error).__name__


def _check_with_less_memory(engine: Engine, row: PackedRow, n_real: int, reasons: list[str]) -> str:
    """Compare the engine with the plain layers; each time memory runs out, reduce its use and try again.

    Raises torch.OutOfMemoryError if memory use cannot be reduced further.
    """
    while True:
        try:
            return check_against_plain(engine, row, n_real)
        except torch.OutOfMemoryError as error:
            out_of_memory = error.with_traceback(None)  # the traceback would keep the tensors of the failed pass alive
        if not (change := engine.reduce_memory()):
            raise out_of_memory
        reasons.append(f"memory ran out in a trial: {change}")


def _trial_row(model: Any, packing: Packing) -> tuple[PackedRow, int]:
    """Return a row of the run's shape with random conversations of mean length, and its number of unpadded tokens."""
    total = packing.tokens if not packing.exact else min(2 * packing.tokens, packing.count * packing.longest)
    base, length = model.get_base_model(), min(packing.longest, max(2, round(packing.mean)))
    ids = torch.randint(base.config.vocab_size, (total,), generator=torch.Generator().manual_seed(0)).tolist()
    conversations = [
        EncodedChat(ids[start : start + length], ids[start : start + length])
        for start in range(0, total - length + 1, length)
    ]
    conversations = conversations[: packing.count if packing.exact else packing.max_conversations]
    n_real = sum(len(conversation.ids) for conversation in conversations)
    row = PackedRow.from_batch(**build_batch(conversations, packing.shape(total)))
    return PackedRow(*(t.to(model.device) for t in row.tensors), row.longest), n_real
