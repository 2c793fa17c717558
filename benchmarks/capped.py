"""phoque with a limit on the GPU memory that torch may allocate: python benchmarks/capped.py GB train ... (0: none)."""

import sys

from phoque.distributed.launch import claim_gpu


def main() -> None:
    """Set the limit, then run the command."""
    claim_gpu()  # before torch is imported
    import torch

    from phoque.cli.main import main as run_command

    limit = float(sys.argv.pop(1))
    if limit and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 1e9 / total))
    run_command()


if __name__ == "__main__":
    main()
