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
from updp.errors import InputError
from updp.processes import share_of

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
        process: tuple[int, int] = (0, 1),
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
            process: which of how many processes reads; each reads its own images, as many as every other.
        """
        self.stream = stream
        self.transform = transform
        self.mode = mode
        self.part = part
        self.part_seed = part_seed
        self.seed = seed
        self.length = int(len(stream) * (part[1] - part[0]))
        self.length = self.length if limit is None else min(limit, self.length)
        self.length //= process[1]
        self.process = process
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

    def shared(self, process: tuple[int, int]) -> StreamSet:
        """What one of several processes reads of this."""
        return StreamSet(self.stream, self.transform, self.mode, part=self.part, part_seed=self.part_seed,
                         seed=self.seed, limit=self.length, process=process)  # fmt: skip

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
            for image, label in self.stream.read(shuffle=shuffle, epoch=order, workers=workers, process=self.process):
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


class SharedBatches(Sampler[list[Any]]):
    """One process's part of every batch; what is left over at the end of an epoch is left out."""

    def __init__(self, sampler: EpochSampler, batch_size: int, process: tuple[int, int]) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.part = share_of(batch_size, process)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list[Any]]:
        keys = iter(self.sampler)
        for _ in range(len(self)):
            yield list(islice(keys, self.batch_size))[self.part]


class Loader(DataLoader[Any]):
    """A DataLoader with ``set_epoch``, which the loaders of accelerate have too.

    Attributes:
        weight: of this process's mean losses, for the mean over processes to be that over all images.
    """

    weight = 1.0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        parts: tuple[Any, ...] = (self.sampler, self.batch_sampler, self.dataset)
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


def loader(
    dataset: Dataset[tuple[Tensor, int]],
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    workers: int = 0,
    process: tuple[int, int] = (0, 1),
) -> Loader:
    """Batches ``(images (N, C, H, W) float32, labels (N,) int64)``.

    For training, batches are shuffled and all of the same size: what is left over at the end of an epoch is
    left out, unless it is all there is. Otherwise images come in their order. ``set_epoch`` gives another
    order and another augmentation; the same epoch gives the same batches, whatever was drawn before and
    however many workers there are (a stream with several workers comes in another order than with one).

    Args:
        batch_size: images in a batch, of all processes together.
        process: which of how many processes trains with these; each gets its part of every batch.

    Raises:
        InputError: a batch cannot be shared out between so many processes.
    """
    options: dict[str, Any] = {
        "num_workers": workers,
        "collate_fn": default_collate,
        # torch draws a number each time it starts: not from the global generator
        "generator": torch.Generator().manual_seed(seed),
    }
    length = len(dataset)  # type: ignore[arg-type]
    size = min(batch_size, max(1, length)) if train else batch_size
    sampler = None
    if train and not isinstance(dataset, IterableDataset):
        sampler = EpochSampler(length, seed, with_epoch=isinstance(dataset, ImageSet))
    if process[1] > 1:
        return _shared(dataset, sampler, size, process, options)
    return Loader(dataset, batch_size=size, sampler=sampler, drop_last=train, **options)


def _shared(
    dataset: Any, sampler: EpochSampler | None, size: int, process: tuple[int, int], options: dict[str, Any]
) -> Loader:
    """A loader of one process's part of every batch."""
    if size < process[1]:
        raise InputError(f"batch_size: {size} images cannot be shared out between {process[1]} processes")
    if sampler is None:
        if size % process[1]:
            raise InputError(
                f"batch_size: got {size}, allowed: a multiple of {process[1]}, the number of processes, as the images "
                "come from a stream"
            )
        return Loader(dataset.shared(process), batch_size=size // process[1], drop_last=True, **options)
    batches = SharedBatches(sampler, size, process)
    result = Loader(dataset, batch_sampler=batches, **options)
    result.weight = (batches.part.stop - batches.part.start) * process[1] / size
    return result


def stack(dataset: Dataset[tuple[Tensor, int]], *, workers: int = 0) -> tuple[Tensor, Tensor]:
    """A whole data set in memory: images ``(N, C, H, W)`` and labels ``(N,)``."""
    batches = list(loader(dataset, 64, train=False, workers=workers))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
