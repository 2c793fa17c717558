"""How full the emptiest row of a group is: rows as they are packed now, and as earlier versions packed them.

    uv run python benchmarks/packing.py

An optimizer step may train on a single row, so a row with one conversation counts as much as a full one. Lengths are
drawn from several distributions; for each, 60 groups of 32 rows are packed.
"""

import statistics

import numpy

from phoque.data.packing import Packing, pack_tightly

GROUPS = 60
LENGTHS = {
    "equal": lambda random, n: numpy.full(n, 220),
    "log-normal, sigma 0.3": lambda random, n: numpy.minimum(1000, 200 * numpy.exp(0.3 * random.standard_normal(n))),
    "log-normal, sigma 0.6": lambda random, n: numpy.minimum(1000, 200 * numpy.exp(0.6 * random.standard_normal(n))),
    "uniform, 50 to 400": lambda random, n: random.integers(50, 400, n),
    "half 20 to 60, half 400 to 900": lambda random, n: numpy.where(
        random.random(n) < 0.5, random.integers(20, 60, n), random.integers(400, 900, n)
    ),
    "nine of ten 40, one 1,000": lambda random, n: numpy.where(random.random(n) < 0.9, 40, 1000),
}
COUNTS = (4, 8, 16, 37)  # conversations per row on average


def draw_group(lengths: list[int], packing: Packing) -> list[int]:
    """The first lengths that make a group."""
    group: list[int] = []
    for length in lengths:
        if packing.is_group_complete(len(group), sum(group)):
            break
        group.append(length)
    return group


def fill_of_emptiest(rows: list[list[int]], lengths: list[int]) -> float:
    """The tokens of the emptiest row, as a share of the average."""
    fills = [sum(lengths[number] for number in row) for row in rows]
    return min(fills) / statistics.mean(fills)


def main() -> None:
    """Print the table of docs/design/packing.md."""
    random = numpy.random.default_rng(0)
    print("| lengths | per row | emptiest row: median, lowest | earlier versions | more rows |\n|---|---|---|---|---|")
    for name, draw in LENGTHS.items():
        for count in COUNTS:
            now, before, more = [], [], []
            for _ in range(GROUPS):
                lengths = draw(random, 60 * count).astype(int).tolist()
                packing = Packing(count, statistics.mean(lengths), max(lengths))
                group = draw_group(lengths, packing)
                rows = packing.rows(group)
                tight = pack_tightly(group, packing.tokens, packing.max_conversations)
                now.append(fill_of_emptiest(rows, group))
                before.append(fill_of_emptiest(tight, group))
                more.append(len(rows) / len(tight) - 1)
            shares = (f"{statistics.median(values):.0%}, {min(values):.0%}" for values in (now, before))
            print(f"| {name} | {count} | {' | '.join(shares)} | {statistics.mean(more):.1%} |")


if __name__ == "__main__":
    main()
