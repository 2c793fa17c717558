"""`python -m phoque`, for launchers such as accelerate."""

from phoque.cli import main

main()
