"""Data sets of tensors, and loaders whose order depends on nothing but the seed and the epoch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from updp.data.sources import Images, Stream, read_image
from updp.data.transforms import Transform, mixed, seeded

_KEEP_BYTES = 128 << 20  # sets that always give the same tensors are kept in memory up to this size


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Some of a source's images as tensors.

    A key is a position, or ``(epoch, position)``: the epoch of an augmentation travels with the key, so that
    worker processes and sharding loaders need not be told about it.
    """

    def __init__(
        self, images: Images, indices: Sequence[int], transform: Transform, mode: str, seed: int | None = None
    ) -> None:
        """Make a data set.

        Args:
            images: where the images come from.
            indices: which of them, in this order.
            transform: PIL image -> tensor (C, H, W).
            mode: PIL's mode of the images that the transform gets.
            seed: of a transform that draws at random; None for one that does not.
        """
        self.images = images
        self.indices = indices
        self.transform = transform
        self.mode = mode
        self.seed = seed
        self._kept: dict[int, tuple[Tensor, int]] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = key if isinstance(key, tuple) else (0, key)
        if position in self._kept:
            return self._kept[position]
        index = self.indices[position]
        image, label = read_image(self.images, index, self.mode)
        if self.seed is not None:
            with seeded(mixed(self.seed, epoch, index)):
                return self.transform(image), label
        tensor = self.transform(image)
        if tensor.nbytes * len(self) <= _KEEP_BYTES:
            self._kept[position] = (tensor, label)
        return tensor, label

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def first(self, count: int) -> ImageSet:
        """The first ``count`` images, or all if there are fewer."""
        return self.part(0, count)

    def part(self, first: int, end: int) -> ImageSet:
        """The images from position ``first`` up to ``end``."""
        return ImageSet(self.images, self.indices[first:end], self.transform, self.mode, self.seed)


class StreamSet(IterableDataset[tuple[Tensor, int]]):
    """A part of a stream as tensors: the images whose pixels have a checksum in a range."""

    def __init__(
        self,
        stream: Stream,
        transform: Transform,
        mode: str,
        *,
        part: tuple[float, float] = (0.0, 1.0),
        part_seed: int = 0,
        seed: int | None = None,
        limit: int | None = None,
    ) -> None:
        """Make a data set.

        Args:
            stream: where the images come from.
            transform: PIL image -> tensor (C, H, W).
            mode: PIL's mode of the images that the transform gets.
            part: images whose checksum, as a number between 0 and 1, is in this range belong to the set.
            part_seed: another seed gives other parts.
            seed: of shuffling and of a transform that draws at random; None to do neither.
            limit: take no more images than this.
        """
        self.stream = stream
        self.transform = transform
        self.mode = mode
        self.part = part
        self.part_seed = part_seed
        self.seed = seed
        self.length = int(len(stream) * (part[1] - part[0]))
        self.length = self.length if limit is None else min(limit, self.length)
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def first(self, count: int) -> StreamSet:
        """The first ``count`` images, or all if there are fewer."""
        return StreamSet(self.stream, self.transform, self.mode, part=self.part, part_seed=self.part_seed,
                         seed=self.seed, limit=min(count, self.length))  # fmt: skip

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        share = self.length * (number + 1) // workers - self.length * number // workers
        for image, label, checksum in islice(self._members(workers), share):
            if self.seed is None:
                yield self.transform(image), label
            else:
                with seeded(mixed(self.seed, self.epoch, checksum)):
                    tensor = self.transform(image)
                yield tensor, label

    def _members(self, workers: int) -> Iterator[tuple[Image.Image, int, int]]:
        """Images of this part with their checksums: once, or, to train on, again and again."""
        for turn in count():
            shuffle = self.seed is not None
            order = mixed(self.seed, self.epoch, turn) & 0x7FFFFFFF if self.seed is not None else 0
            some = False
            for image, label in self.stream.read(shuffle=shuffle, epoch=order, workers=workers):
                image = image.convert(self.mode)
                checksum = zlib.crc32(image.tobytes(), self.part_seed & 0xFFFFFFFF)
                if self.part[0] <= checksum / 2**32 < self.part[1]:
                    some = True
                    yield image, label, checksum
            if not shuffle or not some:
                return


class EpochSampler(Sampler[Any]):
    """All positions in a random order that depends on the seed and the epoch alone."""

    def __init__(self, length: int, seed: int, *, with_epoch: bool) -> None:
        self.length = length
        self.seed = seed
        self.with_epoch = with_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        return iter([(self.epoch, index) for index in order] if self.with_epoch else order)


class Loader(DataLoader[Any]):
    """A DataLoader with ``set_epoch``, which the loaders of accelerate have too."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        for part in (self.sampler, self.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


def loader(
    dataset: Dataset[tuple[Tensor, int]], batch_size: int, *, train: bool, seed: int = 0, workers: int = 0
) -> Loader:
    """Batches ``(images (N, C, H, W) float32, labels (N,) int64)``.

    For training, batches are shuffled and all of the same size: what is left over at the end of an epoch is
    left out, unless it is all there is. Otherwise images come in their order. ``set_epoch`` gives another
    order and another augmentation; the same epoch gives the same batches, whatever was drawn before and
    however many workers there are (a stream with several workers comes in another order than with one).
    """
    streams = isinstance(dataset, IterableDataset)
    length = len(dataset)  # type: ignore[arg-type]
    sampler = None
    if train and not streams:
        sampler = EpochSampler(length, seed, with_epoch=isinstance(dataset, ImageSet))
    return Loader(
        dataset,
        batch_size=min(batch_size, max(1, length)) if train else batch_size,
        sampler=sampler,
        drop_last=train,
        num_workers=workers,
        collate_fn=default_collate,
        # torch draws a number each time it starts: not from the global generator
        generator=torch.Generator().manual_seed(seed),
    )


def stack(dataset: Dataset[tuple[Tensor, int]], *, workers: int = 0) -> tuple[Tensor, Tensor]:
    """A whole data set in memory: images ``(N, C, H, W)`` and labels ``(N,)``."""
    batches = list(loader(dataset, 64, train=False, workers=workers))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
