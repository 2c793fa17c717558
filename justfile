# Recipes for developing phoque.

setup:
    uv sync

test:
    uv run pytest

test-all: test
    uv run pytest -m "(slow or thorough) and not alone" -n 2 --dist loadfile --no-loadscope-reorder
    uv run pytest -m alone -n 0

lint:
    uv run ruff format --check .
    uv run ruff check .
    uv run lint-imports

types:
    uv run ty check

docs:
    uv run python docs/generate.py
    uvx --from 'mkdocs>=1.6,<2' --with 'mkdocs-material>=9.6,<10' mkdocs build --strict --site-dir site

models:
    uv run python benchmarks/families.py --browser --write

bench:
    uv run python benchmarks/startup.py
    uv run python benchmarks/demo.py
    uv run python benchmarks/data.py
    uv run python benchmarks/faults.py
    uv run python benchmarks/merge.py
    uv run python benchmarks/psm.py
    uv run python benchmarks/sae.py
    uv run python benchmarks/onnx_export.py

demo:
    uv run phoque train --preset demo --max-steps 20
