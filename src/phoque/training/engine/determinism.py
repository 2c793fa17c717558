"""Deterministic training: the same command on the same kind of GPU gives the same adapter, bit for bit."""

import os

import torch


def make_deterministic(is_deterministic: bool) -> None:
    """Choose kernels whose sums have a fixed order, or allow all. Call it before the first CUDA operation.

    It makes the attention's backward pass deterministic, gives cuBLAS a fixed workspace, and stops torch.compile from
    choosing kernels by their measured speed, which differs from run to run. benchmarks/determinism.py measures the
    cost.
    """
    if is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(is_deterministic)
    # it would also fill new memory with NaN, which finds faults and takes time
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010, its type is unknown
    if torch.cuda.is_available():
        import torch._inductor.config as inductor

        inductor.deterministic = is_deterministic
