"""Scoring many subnets at once: subnets that agree on their first blocks share the work of those blocks.

The population is a tree of choices in the order of execution. It is walked depth first, one chunk of images at a time;
an activation is kept only where subnets part, and only until the last of them has gone on. Norms are estimated first,
in a walk of its own: a pruned block's statistics depend on every choice before it and on nothing behind it, so they
belong to a node of the tree; all calibration images pass a node before anything deeper is touched.

Memory: while scoring, at most one chunk's activation per depth; while calibrating, at most one activation of all
calibration images per depth (256 by default); and the statistics of every node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from updp.errors import InputError
from updp.oracle import Score, Tally, evaluate
from updp.search.tree import Path, count_block_evaluations, fork, split
from updp.stretches import StretchRunner, UnresumableError, alike, check_stretches
from updp.structure import evaluating
from updp.subnet import SubnetConfig
from updp.supernet import Supernet, estimating

_Statistics = dict[Path, list[Tensor]]  # a node of the tree -> the buffers of the norms of its last block


class PrefixEvaluator:
    """Held-out scores of subnets of one supernet; norms are recalibrated for every subnet.

    Scores are those of `score_unshared`, bit for bit. A model that cannot be entered between its blocks is evaluated
    without sharing, and ``reason`` says why. The supernet is left as it was found: subnet and statistics.

    Args:
        score_batches: chunks of (images, labels).
        calibration_batches: chunks of images.
        device: where the supernet is; None: ask its parameters.

    Attributes:
        block_evaluations: blocks run for scoring so far, as `count_block_evaluations` counts: "shared" is what was
            run, "unshared" what would have been run without sharing.
        reason: why nothing is shared; None when prefixes are.
        order: the blocks in order of execution.

    Raises:
        InputError: no images, or a label that the network has no output for.
    """

    def __init__(
        self,
        supernet: Supernet,
        score_batches: Sequence[tuple[Tensor, Tensor]],
        calibration_batches: Sequence[Tensor],
        device: torch.device | str | None = None,
    ) -> None:
        self.block_evaluations = {"shared": 0, "unshared": 0}
        self.reason: str | None = None
        self._supernet = supernet
        self._device = torch.device(device or next(supernet.parameters()).device)
        self._score_batches = list(score_batches)
        self._calibration_batches = list(calibration_batches)
        if not self._score_batches or not self._calibration_batches:
            raise InputError("no images to score or calibrate subnets on")
        self._blocks = dict(supernet.blocks)
        self.order: Path = tuple(self._blocks)
        self._norms = _norms_of(supernet)
        self._runner: StretchRunner | None = None
        with self._undisturbed():
            images = self._score_batches[0][0][:2].to(self._device)
            self._check_labels(supernet.model(images).shape[1])
            try:
                runner = StretchRunner(supernet.model, self._blocks, [images, *self._chunks()])
                self._check_resuming(runner, images)
                self._runner, self.order = runner, runner.order
            except UnresumableError as error:
                self.reason = str(error)

    def score(self, configs: Sequence[SubnetConfig]) -> list[Score]:
        """Scores in the order of the configs.

        Raises:
            InputError: a config does not fit the supernet.
        """
        distinct = list(dict.fromkeys(configs))
        shared, unshared = count_block_evaluations(distinct, self.order)
        scores = None
        if self._runner is not None:
            try:
                scores = self._score_shared(self._runner, distinct)
            except UnresumableError as error:
                self._runner, self.reason = None, str(error)
        if scores is None:
            scores, shared = self.score_unshared(distinct), unshared
        self.block_evaluations["shared"] += shared
        self.block_evaluations["unshared"] += unshared
        found = dict(zip(distinct, scores, strict=True))
        return [found[config] for config in configs]

    def score_unshared(self, configs: Sequence[SubnetConfig]) -> list[Score]:
        """The same scores, every subnet calibrated and evaluated by itself; not counted."""
        scores = []
        with self._undisturbed():
            for config in configs:
                self._supernet.set_subnet(config)
                self._supernet.calibrate(images.to(self._device) for images in self._calibration_batches)
                scores.append(evaluate(self._supernet.model, self._score_batches, self._device))
        return scores

    # --- the two walks ---

    def _score_shared(self, runner: StretchRunner, configs: Sequence[SubnetConfig]) -> list[Score]:
        with self._undisturbed():
            for config in configs:
                self._supernet.set_subnet(config)  # refuses what does not fit
            paths = [tuple(config.choice(block) for block in self.order) for config in configs]
            with torch.autocast(self._device.type, enabled=False):
                statistics = self._calibrate(runner, paths)
            tallies = {path: Tally() for path in paths}
            for images, labels in self._score_batches:
                self._score_chunk(runner, images.to(self._device), labels.to(self._device), statistics, tallies)
        return [tallies[path].score() for path in paths]

    def _score_chunk(
        self,
        runner: StretchRunner,
        images: Tensor,
        labels: Tensor,
        statistics: _Statistics,
        tallies: Mapping[Path, Tally],
    ) -> None:
        end = len(self.order)
        stack = [(list(tallies), 0, _Held([images], 1))]
        while stack:
            group, start, held = stack.pop()
            (x,) = held.take()
            stop = fork(group, start)
            if stop > start:
                self._enter(group[0], start, stop, statistics)
                x = runner.run(images, x, start, stop if stop < end else None)
            if stop == end:
                tallies[group[0]].add(x, labels)
            else:
                parts = split(group, stop)
                held = _Held([x], len(parts))
                stack += [(part, stop, held) for part in parts]

    def _calibrate(self, runner: StretchRunner, paths: Sequence[Path]) -> _Statistics:
        """The statistics of every node that owns norms: those that `Supernet.calibrate` finds on its path."""
        statistics: _Statistics = {}
        batches = [images.to(self._device) for images in self._calibration_batches]
        stack = [(self._up_to_last_norm(paths), 0, _Held(list(batches), 1))]
        while stack:
            group, here, held = stack.pop()
            chunks = held.take()  # their activations at position `here`
            estimated = here  # the norms before this position are estimated
            while group := [path for path in group if len(path) > estimated]:
                end = fork(group, estimated)
                owners = (i for i in range(estimated, end) if self._norms_at(group[0], i))
                stop = next(owners, end)
                if stop > here:
                    self._enter(group[0], here, stop)
                    for i, images in enumerate(batches):
                        chunks[i] = runner.run(images, chunks[i], here, stop)
                    here = stop
                if stop == end:
                    parts = split(group, stop)
                    held = _Held(chunks, len(parts))
                    stack += [(part, stop, held) for part in parts]
                    break
                statistics[group[0][: stop + 1]] = self._estimate(runner, group[0], stop, batches, chunks)
                estimated = stop + 1
        return statistics

    def _estimate(
        self, runner: StretchRunner, path: Path, position: int, batches: Sequence[Tensor], chunks: Sequence[Tensor]
    ) -> list[Tensor]:
        self._enter(path, position, position + 1)
        norms = self._norms_at(path, position)
        with estimating(norms):
            for images, x in zip(batches, chunks, strict=True):
                runner.run(images, alike(x), position, position + 1)
        return [buffer.clone() for norm in norms for buffer in norm.buffers()]

    def _up_to_last_norm(self, paths: Sequence[Path]) -> list[Path]:
        """The paths as far as calibration has to walk them."""
        ends = (max((i + 1 for i in range(len(path)) if self._norms_at(path, i)), default=0) for path in paths)
        return [path for path in dict.fromkeys(p[:end] for p, end in zip(paths, ends, strict=True)) if path]

    def _norms_at(self, path: Path, position: int) -> list[_BatchNorm]:
        return self._norms.get((self.order[position], path[position]), [])

    def _enter(self, path: Path, start: int, stop: int, statistics: _Statistics | None = None) -> None:
        """Choose the blocks of a stretch, and give their norms the statistics of this path."""
        for position in range(start, stop):
            self._blocks[self.order[position]].active = path[position]
            norms = self._norms_at(path, position)
            if norms and statistics is not None:
                buffers = [buffer for norm in norms for buffer in norm.buffers()]
                for buffer, value in zip(buffers, statistics[path[: position + 1]], strict=True):
                    buffer.copy_(value)

    # --- checks and housekeeping ---

    def _check_labels(self, classes: int) -> None:
        highest = max(int(labels.max()) for _, labels in self._score_batches)
        if highest >= classes:
            raise InputError(f"label {highest} for a network of {classes} classes")

    def _chunks(self) -> Iterator[Tensor]:
        for images, _ in self._score_batches:
            yield images.to(self._device)
        for images in self._calibration_batches:
            yield images.to(self._device)

    def _check_resuming(self, runner: StretchRunner, images: Tensor) -> None:
        """Entering the model behind any block gives the bits of the plain forward pass."""
        for config in (self._supernet.all_keep(), self._supernet.all_pruned()):
            self._supernet.set_subnet(config)
            check_stretches(runner, self._supernet.model, self._blocks, images)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Eval mode, no gradients and blend 1 inside; modes, subnet, blend and statistics are restored afterwards."""
        subnet = self._supernet.subnet
        blends = [block.blend for block in self._blocks.values()]
        buffers = [buffer for norms in self._norms.values() for norm in norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        with evaluating(self._supernet), torch.no_grad():
            try:
                self._supernet.set_blend(1.0)
                yield
            finally:
                self._supernet.set_subnet(subnet)
                for block, blend in zip(self._blocks.values(), blends, strict=True):
                    block.blend = blend
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)


class _Held:
    """Activations that several subnets go on from: copies for all but the last, so that none can spoil another's."""

    def __init__(self, tensors: list[Tensor], uses: int) -> None:
        self._tensors = tensors
        self._uses = uses

    def take(self) -> list[Tensor]:
        self._uses -= 1
        if self._uses:
            return [alike(x) for x in self._tensors]
        tensors, self._tensors = self._tensors, []
        return tensors


def _norms_of(supernet: Supernet) -> dict[tuple[str, str], list[_BatchNorm]]:
    """(block, choice) -> the norms that its pruned flow owns."""
    found = {}
    for name, block in supernet.blocks.items():
        active = block.active
        for choice in block.choices:
            block.active = choice
            found[name, choice] = [norm for norm in block.norms() if isinstance(norm, _BatchNorm)]
        block.active = active
    return found
