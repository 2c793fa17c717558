"""Milliseconds of attention over a packed row, forward and backward, by kernel and by the length of conversations.

Run on a GPU machine: python benchmarks/attention.py [--tokens 8192 --lengths 120 700 2048 8192]

The row has the heads of Ministral 3 3B (32 query heads, 8 key heads of size 128) in bf16. The lengths of its
conversations are drawn from a log-normal around the given mean; a mean of the whole row is one conversation. Each
kernel gets queries, keys and values as the model's layers hand them over; repeating the key heads, where a kernel
needs it, counts. Times are those of a CUDA graph of ten passes, so no launch counts. The results are compared with
torch's kernel.
"""

import argparse
import functools
import importlib.util
import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

HEADS, KV_HEADS, SIZE = 32, 8, 128
PASSES = 10


def draw_borders(tokens: int, mean: int) -> list[int]:
    """Cumulative lengths of conversations that fill a row."""
    rng, borders = random.Random(0), [0]
    while borders[-1] < tokens:
        drawn = tokens if mean >= tokens else max(8, int(rng.lognormvariate(math.log(mean) - 0.245, 0.7)))
        borders.append(min(tokens, borders[-1] + drawn))
    return borders


def find_kernels(borders: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """The kernels that this machine has, by name, as functions of (1, heads, T, size)."""
    from phoque.training.engine import attention
    from phoque.training.engine.attention_kernels import attend_packed

    kernels = {"phoque": attend_packed, "torch varlen": attention._make_varlen_attention()}
    kernels["torch FlexAttention"] = make_flex(borders)
    if importlib.util.find_spec("flash_attn"):
        kernels["flash-attn-4"] = attention.flash_attention_4
    return kernels


def make_flex(borders: torch.Tensor) -> Callable[..., Any]:
    """FlexAttention with a mask of conversations; the mask is built once for a row, outside the measured time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total = int(borders[-1])
    conversation = torch.searchsorted(borders, torch.arange(total, device="cuda", dtype=torch.int32), right=True)

    def is_visible(b: Any, h: Any, query: Any, key: Any) -> Any:
        return (conversation[query] == conversation[key]) & (query >= key)

    mask = create_block_mask(is_visible, None, None, total, total, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(module: Any, q: Any, k: Any, v: Any, _: None, scaling: float, **__: Any) -> tuple[torch.Tensor, None]:
        return compiled(q, k, v, block_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2), None

    return attend


def time_graph(run: Callable[[], Any]) -> float:
    """Milliseconds of one call, of a graph of PASSES calls: the best of five replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(PASSES):
            run()
    best = math.inf
    for _ in range(5):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        best = min(best, begun.elapsed_time(ended) / PASSES)
    return best


def measure(attend: Callable[..., Any], borders: torch.Tensor, longest: int) -> tuple[float, float, list[torch.Tensor]]:
    """Milliseconds of the forward and of the backward pass; the output and the gradients."""
    rng = torch.Generator("cuda").manual_seed(0)
    total = int(borders[-1])

    def draw(heads: int) -> torch.Tensor:
        drawn = torch.randn(1, total, heads, SIZE, generator=rng, device="cuda", dtype=torch.bfloat16)
        return drawn.transpose(1, 2).requires_grad_()

    inputs, upstream = [draw(n) for n in (HEADS, KV_HEADS, KV_HEADS)], draw(HEADS).detach().transpose(1, 2)
    call = functools.partial(attend, None, *inputs, None, scaling=SIZE**-0.5, cu_seq_lens_q=borders)
    forward = functools.partial(call, max_length_q=longest)
    with torch.no_grad():
        forward_ms = time_graph(forward)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward()[0], inputs, upstream)

    both_ms = time_graph(both)
    return forward_ms, both_ms - forward_ms, [forward()[0].detach(), *both()]


def main(tokens: int, lengths: list[int], deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, deterministic: {deterministic}\n")
    print("| tokens | mean length | kernel | forward, ms | backward, ms | largest difference from torch varlen |")
    print("|---|---|---|---|---|---|")
    for mean in lengths:
        drawn = draw_borders(tokens, mean)
        borders = torch.tensor(drawn, dtype=torch.int32, device="cuda")
        longest = max(end - start for start, end in pairwise(drawn))
        found: dict[str, Any] = {}
        for name, attend in find_kernels(borders).items():
            try:
                found[name] = measure(attend, borders, longest)
            except Exception as error:  # another kernel's failure does not end the table
                print(f"| {tokens} | {mean} | {name} | {type(error).__name__}: {str(error)[:80]} | | |")
        for name, (forward_ms, backward_ms, results) in found.items():
            difference = max(
                float((a - b).float().norm() / b.float().norm())
                for a, b in zip(results, found["torch varlen"][2], strict=True)
            )
            print(
                f"| {tokens} | {mean} | {name} | {forward_ms:.3f} | {backward_ms:.3f} | {difference:.4f} |", flush=True
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--lengths", type=int, nargs="+", default=[120, 700, 2048, 8192])
    parser.add_argument("--deterministic", action="store_true", help="of torch's kernel; phoque's always is")
    asked = parser.parse_args()
    main(asked.tokens, asked.lengths, asked.deterministic)
