"""The tree of a population's choices: subnets that agree on their first blocks share a path from the root."""

from __future__ import annotations

from collections.abc import Sequence

from updp.subnet import SubnetConfig

Path = tuple[str, ...]  # the choices of the first blocks, in order of execution


def count_block_evaluations(configs: Sequence[SubnetConfig], blocks: Sequence[str]) -> tuple[int, int]:
    """How many blocks are run to score these subnets, in passes over the images.

    Args:
        blocks: in order of execution.

    Returns:
        With shared prefixes (the number of distinct ones), and without. A subnet given twice counts once.
    """
    paths = {tuple(config.choice(block) for block in blocks) for config in configs}
    prefixes = {path[:length] for path in paths for length in range(1, len(blocks) + 1)}
    return len(prefixes), len(paths) * len(blocks)


def fork(group: Sequence[Path], start: int) -> int:
    """The first position from ``start`` on where the paths differ or the shortest ends."""
    shortest = min(len(path) for path in group)
    return next((i for i in range(start, shortest) if len({path[i] for path in group}) > 1), shortest)


def split(group: Sequence[Path], position: int) -> list[list[Path]]:
    """The paths of a group by their choice at a position, in the order in which the choices come."""
    parts: dict[str, list[Path]] = {}
    for path in group:
        parts.setdefault(path[position], []).append(path)
    return list(parts.values())
