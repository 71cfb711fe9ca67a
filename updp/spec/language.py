"""What a spec says, as frozen dataclasses. Nothing here knows YAML or torch.

Everything that can turn out wrong when the spec is bound to a model carries the ``place`` it was written at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from updp.errors import Place
from updp.spec.settings import DEFAULT_SCHEDULE, Schedule

LAYERS = ("identity", "batchnorm", "relu", "relu6", "gelu", "silu", "hardswish")
"""Layers that ``replace`` may name; ``append`` may name all but ``identity``."""

RESERVED_CHOICES = ("keep", "drop")
"""Choices that every block has or may have, so no recipe can be called so."""


@dataclass(frozen=True)
class Step:
    """A submodule, parameter or method of the block, by its path inside the block."""

    path: str
    optional: bool = False
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Opaque:
    """A step that is run as it is and never looked into.

    ``enters`` and ``leaves`` are claims, to be tested: a diagonal before the step can be folded into the
    linear operators in ``enters``, a diagonal after it into those in ``leaves``.
    """

    path: str
    enters: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Sum:
    """Parallel branches whose results are added; an empty branch is the identity."""

    branches: tuple[Flow, ...]
    name: str | None = None
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Negate:
    """Multiply by -1."""

    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Across:
    """Run ``flow`` with another axis in the place of the channels (token-mixing layers)."""

    axis: Literal["tokens"]
    flow: Flow
    place: Place | None = field(default=None, compare=False)


Node: TypeAlias = Step | Opaque | Sum | Negate | Across
Flow: TypeAlias = tuple[Node, ...]


def walk(flow: Flow) -> Iterator[Node]:
    """All nodes of a flow, each before what it contains, in the order of execution."""
    for node in flow:
        yield node
        inner = node.branches if isinstance(node, Sum) else (node.flow,) if isinstance(node, Across) else ()
        for branch in inner:
            yield from walk(branch)


def names_in(flow: Flow) -> tuple[str, ...]:
    """Names that a recipe may use for parts of this flow: steps, opaque steps and named sums, in order."""
    paths = (node.name if isinstance(node, Sum) else getattr(node, "path", None) for node in walk(flow))
    return tuple(path for path in paths if path is not None)


@dataclass(frozen=True)
class Moment:
    """A moment of finetuning: a fraction of it, or an epoch. Exactly one of the two is set."""

    fraction: float | None = None
    epoch: int | None = None

    def progress(self, total_epochs: int) -> float:
        """The moment as a fraction of ``total_epochs``, between 0 and 1."""
        if self.fraction is not None:
            return self.fraction
        if self.epoch is None or total_epochs <= 0:
            return 0.0
        return min(1.0, self.epoch / total_epochs)


@dataclass(frozen=True)
class Resize:
    """Crop a convolution's weight to its centre of ``kernel`` by ``kernel``, at a moment of finetuning."""

    kernel: int
    at: Moment = Moment(fraction=0.0)
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Replace:
    """Put a layer of :data:`LAYERS` in the place of a step."""

    target: str
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Append:
    """Add layers, in order of execution, after a step or (``after`` is None) at the end of the block."""

    layers: tuple[str, ...]
    after: str | None = None
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Recipe:
    """How a structure becomes a pruned structure; ``extends`` is already resolved.

    ``merge`` is ``"all"`` (every maximal affine run that the recipe touched) or lists of steps, a list for
    each merge.
    ``padding`` says where a merge puts the paddings: on the first operator, or where they are.
    A ``reparam`` recipe makes nothing shallower and stays out of the search. ``compose`` says when what merges
    becomes one operator: when all is trained, or before.
    """

    name: str
    replace: Mapping[str, Replace]
    resize: Mapping[str, Resize]
    append: tuple[Append, ...] = ()
    merge: Literal["all"] | tuple[tuple[str, ...], ...] = "all"
    padding: Literal["first", "keep"] = "first"
    kind: Literal["prune", "reparam"] = "prune"
    compose: Literal["start", "end"] = "end"
    place: Place | None = field(default=None, compare=False)
    merge_places: tuple[tuple[Place, ...], ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class BlockGroup:
    """Blocks of one structure: those that ``match`` names and ``except_`` does not."""

    match: tuple[str, ...]
    except_: tuple[str, ...]
    structure: str
    recipes: tuple[str, ...]
    place: Place | None = field(default=None, compare=False)
    match_places: tuple[Place, ...] = field(default=(), compare=False)
    except_places: tuple[Place, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class ModelSource:
    """What builds the network: ``timm.create_model`` with a name, or the function ``name`` of a Python module.

    A module is never imported because a spec names it: see :mod:`updp.allowed`.
    """

    name: str
    kwargs: Mapping[str, Any]
    module: str | None = None
    place: Place | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name if self.module is None else f"{self.module}:{self.name}"


@dataclass(frozen=True)
class DataSettings:
    """What the spec changes in the data settings that come with the model; None leaves one as it is."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None


@dataclass(frozen=True)
class ArchSpec:
    """A whole spec. ``text`` is the file's own text and needs no other file; ``hash`` is its SHA-256."""

    name: str
    text: str
    file: str
    hash: str
    model: ModelSource
    input: tuple[int, int, int]
    structures: Mapping[str, Flow]
    recipes: Mapping[str, Recipe]
    blocks: tuple[BlockGroup, ...]
    data: DataSettings = DataSettings()
    schedule: Schedule = DEFAULT_SCHEDULE
