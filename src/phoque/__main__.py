"""`python -m phoque`, for launchers such as accelerate."""

from phoque.cli.main import main

main()
