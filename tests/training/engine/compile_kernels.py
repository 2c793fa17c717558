"""Compile the engine's Triton kernels for several GPUs; print the KiB of shared memory that each needs, as JSON."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phoque.training.engine import attention_kernels, gated_kernels

CAPABILITIES = (80, 86, 90)  # A100; A10G, L4 and the like; H100
FP32 = {"lse", "delta", "scale", "scaling", "scales", "largest"}


def compile_kernel(kernel, constants, capability, warps, stages):
    """The KiB of shared memory that it needs for bf16 tensors."""
    names = kernel.arg_names
    signature = {
        name: "constexpr"
        if name in constants
        else "*i32"
        if name == "bounds"
        else "fp32"
        if name in ("scale", "scaling")
        else "*fp32"
        if name in FP32
        else "i32"
        if name in ("tokens", "features") or name.endswith(("_token", "_head"))
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
    print(json.dumps(found))


if __name__ == "__main__":
    main()
