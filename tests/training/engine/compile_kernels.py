"""Compile the engine's Triton kernels for several GPUs; print the KiB of shared memory that each needs, as JSON."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phoque.training.engine import attention_kernels, gated_kernels

CAPABILITIES = (80, 86, 89, 90, 100, 120)  # A100; A10G; L4, L40S; H100, H200; B200; RTX 5090
FP32 = {"lse", "delta", "scale", "scaling", "scales", "largest", "factors"}
INTEGERS = {"tokens", "features", "count", "window", "row_count", "column_count"}


def compile_kernel(kernel, constants, capability, warps, stages):
    """The KiB of shared memory that it needs for bf16 tensors."""
    names = kernel.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else "*i32"
        if name in ("bounds", "borders")
        else "*fp8e4nv"
        if name == "codes"
        else "fp32"
        if name in ("scale", "scaling")
        else "*fp32"
        if name in FP32
        else "i32"
        if name in INTEGERS or name.endswith(("_token", "_head"))
        else "*bf16"
        for name in names
    }
    aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if signature[name] in ("*bf16", "i32")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared / 1024


def main():
    found = {}
    for capability in CAPABILITIES:
        for size in (64, 128, 256):
            shape = {"HEADS": 8, "KV_HEADS": 2, "SIZE": size, "BLOCK_SIZE": size}
            for kernel, tiles in (
                (attention_kernels._attend_tile, attention_kernels._forward_tiles(size)),
                (attention_kernels._compute_query_gradients, attention_kernels._query_tiles(size)),
                (attention_kernels._compute_key_gradients, attention_kernels._key_tiles(size)),
            ):
                constants = shape | {"BLOCK_Q": tiles.queries, "BLOCK_K": tiles.keys}
                found[f"{kernel.__name__} {size} sm{capability}"] = compile_kernel(
                    kernel, constants, capability, tiles.warps, tiles.stages
                )
        for rank, activation in ((8, "silu"), (16, "gelu_pytorch_tanh"), (64, "silu")):
            constants = gated_kernels._constants(rank, activation) | {"QUANTIZE": True}
            for kernel, more in ((gated_kernels._gate, {}), (gated_kernels._gate_backward, {"RECOMPUTE": True})):
                found[f"{kernel.__name__} {rank} sm{capability}"] = compile_kernel(
                    kernel, constants | more, capability, gated_kernels.WARPS, 3
                )
        blocks = {"BLOCK": attention_kernels.BOUNDS_BLOCK, "BLOCK_BORDERS": attention_kernels.BOUNDS_BLOCK}
        tiles = {"BLOCK_ROWS": gated_kernels.QUANTIZED_ROWS, "BLOCK_COLUMNS": gated_kernels.QUANTIZED_COLUMNS}
        quantizing = [] if capability < 89 else [tiles | {"HAS_SCALES": scales} for scales in (False, True)]
        for kernel, variants in ((attention_kernels._find_bounds, [blocks]), (gated_kernels._quantize, quantizing)):
            for number, constants in enumerate(variants):
                name = f"{kernel.__name__} {number} sm{capability}"
                found[name] = compile_kernel(kernel, constants, capability, 4, 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
