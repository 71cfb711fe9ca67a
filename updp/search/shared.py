"""Subnets shared out between the processes of a run, and their scores gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from updp import processes
from updp.oracle import Score
from updp.search.cache import Oracle
from updp.subnet import SubnetConfig


class SharedOracle:
    """An oracle of which each process asks its own for a part; every process gets all scores.

    All processes ask for the same subnets in the same order. Parts are neighbours in the tree of prefixes, so that
    little is run twice. A score does not depend on what else is scored, so the number of processes changes no bit.

    Args:
        oracle: this process's.
        blocks: in order of execution.
    """

    def __init__(self, oracle: Oracle, blocks: Sequence[str]) -> None:
        self._oracle = oracle
        self._blocks = tuple(blocks)

    def score(self, configs: Sequence[SubnetConfig]) -> list[Score]:
        if processes.count() == 1:
            return self._oracle.score(configs)
        order = sorted(range(len(configs)), key=lambda i: [configs[i].choice(block) for block in self._blocks])
        own = [configs[i] for i in order[processes.share_of(len(configs))]]
        rows = processes.gathered([astuple(score) for score in (self._oracle.score(own) if own else [])])
        scores = (Score(*row) for part in rows for row in part)
        found = dict(zip(order, scores, strict=True))
        return [found[i] for i in range(len(configs))]
