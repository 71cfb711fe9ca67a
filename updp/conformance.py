"""Whether a spec tells the truth about its network, and whether all its merges are exact.

For one block of every kind: the declared structure equals the block's own forward, in eval and in train mode with all
drop rates above zero; every claim of an opaque step holds at several sizes; every recipe merges with its certificate,
is shallower, and is told when it costs more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from updp import affine
from updp import spec as language
from updp.certificate import BOUND, OpRecord, certify_block, relative
from updp.errors import CertificateError, MergeError, Problem, SpecError
from updp.flow import Call, map_tensors, walk
from updp.hooks import Hooks
from updp.kinds import kind_of
from updp.merging import MergedBlock, claims_of, fold_into, merge_flow
from updp.oracle import count_macs, flow_depth
from updp.problems import say_once
from updp.randomize import randomize
from updp.recipe import prune
from updp.spec import ArchSpec
from updp.structure import BoundBlock, bind, create_model
from updp.widths import MISFITS, misfit

TOLERANCE = 1e-12  # of max|block output|: sums of three branches may round differently
DROP_RATE = 0.3


@dataclass(frozen=True)
class RecipeCheck:
    """One recipe on one kind of block: its certificate and what it saves."""

    block: str
    blocks: int
    structure: str
    recipe: str
    input: tuple[int, ...]
    worst: float
    ops: int
    depth: tuple[int, int]
    macs: tuple[int, int]

    @property
    def dearer(self) -> bool:
        """The merged block costs more multiply-accumulates than the block."""
        return self.macs[1] > self.macs[0]


@dataclass(frozen=True)
class CheckReport:
    """What was checked of one spec, at one input size."""

    spec: str
    input: tuple[int, int, int]
    blocks: int
    kinds: int
    conformance: float
    recipes: tuple[RecipeCheck, ...]

    @property
    def worst(self) -> float:
        return max((check.worst for check in self.recipes), default=0.0)

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(check), "dearer": check.dearer} for check in self.recipes]
        return {**asdict(self), "recipes": rows, "worst": self.worst}


def block_kinds(bound: dict[str, BoundBlock]) -> dict[str, list[str]]:
    """The first block of every kind -> all blocks of that kind."""
    kinds: dict[str, list[str]] = {}
    for name, block in bound.items():
        kinds.setdefault(block.signature(), []).append(name)
    return {names[0]: names for names in kinds.values()}


def odd_size(spec: ArchSpec) -> tuple[int, int, int] | None:
    """An odd, oblong input that the network takes: small where it can be; None where only its own size will do."""
    channels, height, width = spec.input
    model = create_model(spec).eval()
    for size in ((height * 5 // 8 | 1, width // 2 | 1), (height + 1 | 1, width + 3 | 1)):
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, *size))
            return (channels, *size)
        except (RuntimeError, AssertionError, ValueError):
            continue
    return None


def check_spec(
    spec: ArchSpec,
    *,
    size: tuple[int, int, int] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> CheckReport:
    """Check one spec at one input size.

    Args:
        size: (channels, height, width); the spec's own when left out.
        progress: called with what is being checked.

    Raises:
        SpecError: the structure computes something else, a claim is false, a recipe shortens nothing.
        MergeError: a recipe's merge is not exact.
        CertificateError: a merge came out wrong: a defect of the engine.
    """
    bound = bind(spec, create_model(spec, seed=seed, drop_path=DROP_RATE, input=size), size)
    kinds = block_kinds(bound)
    worst = 0.0
    rows: list[RecipeCheck] = []
    problems: list[tuple[Sequence[str], Problem]] = []
    for name, names in kinds.items():
        if progress is not None:
            progress(name)
        block = _exact(bound[name], seed)
        found: list[RecipeCheck | Problem] = []
        try:
            worst = max(worst, check_conformance(block, seed))
            check_claims(block, seed)
            for recipe in block.group.recipes:
                found += _check_recipe(spec, block, recipe, len(names), seed)
        except SpecError as error:
            found += error.problems
        rows += [item for item in found if isinstance(item, RecipeCheck)]
        problems += [(names, item) for item in found if isinstance(item, Problem)]
    if problems:
        raise SpecError(say_once(problems))
    return CheckReport(spec.name, size or spec.input, len(bound), len(kinds), worst, tuple(rows))


def _exact(block: BoundBlock, seed: int) -> BoundBlock:
    """The block in float64 with every parameter and statistic random."""
    exact = copy.deepcopy(block)
    exact.module.double()
    exact.flow.double()
    exact.args, exact.kwargs = map_tensors((exact.args, exact.kwargs), _exact_tensor)
    randomize(exact.module, seed)
    return exact


def _exact_tensor(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


# --- structure --------------------------------------------------------------------------------------------------------


def check_conformance(block: BoundBlock, seed: int = 0) -> float:
    """Run structure and block side by side, in eval mode and in train mode with drop rates above zero.

    Returns:
        The largest relative difference.

    Raises:
        SpecError: they differ, or the structure does not run; the message names the first step that does not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for training in (False, True):
        own, declared = copy.deepcopy((block.module, block.flow))
        for module in (own, declared):
            module.train(training)
            _set_drop_rates(module, DROP_RATE)
        x = torch.randn(block.input_shape, generator=generator, dtype=torch.float64)
        expected = _seeded(seed, lambda: own(x.clone(), *block.args, **block.kwargs))  # noqa: B023
        try:
            got = _seeded(seed, lambda: declared(x.clone()))  # noqa: B023
        except MISFITS as failure:
            raise _does_not_run(block, x, failure) from None
        error = relative(got, expected)
        if not error <= TOLERANCE:
            raise _differs(block, x, training, error, seed)
        worst = max(worst, error)
    return worst


def _set_drop_rates(module: nn.Module, rate: float) -> None:
    for part in module.modules():
        if kind_of(part).name == "drop":
            for attribute in ("p", "drop_prob"):
                if hasattr(part, attribute):
                    setattr(part, attribute, rate)


def _seeded(seed: int, run: Callable[[], Tensor]) -> Tensor:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            return run()
    finally:
        torch.set_rng_state(state)


def _differs(block: BoundBlock, x: Tensor, training: bool, error: float, seed: int) -> SpecError:
    """Say at which step the structure leaves the block's own computation."""
    own, declared = copy.deepcopy((block.module, block.flow))
    for module in (own, declared):
        module.train(training)
        _set_drop_rates(module, DROP_RATE)
    names = [node.name for node in walk(declared.nodes) if isinstance(node, Call)]
    mine = _outputs(lambda: declared(x.clone()), {n: declared.part(n) for n in names}, seed)
    parts = {n: m for n in names if (m := _submodule(own, n)) is not None}
    theirs = _outputs(lambda: own(x.clone(), *block.args, **block.kwargs), parts, seed)
    first = next((n for n in names if n in mine and n in parts and _unlike(mine[n], theirs.get(n))), None)
    mode = "train" if training else "eval"
    where = f"structures.{block.group.structure}"
    message = f"computes something else than {type(block.module).__name__}.forward of {block.name} in {mode} mode"
    message += f" (relative difference {error:.1e})"
    if first is not None:
        message += f"; the first step that differs is {first!r}"
    elif unused := [n for n in _leaves(own, names) if _runs(own, n, x, block, seed)]:
        message += f"; every declared step agrees, so something is missing: not declared: {', '.join(unused[:6])}"
    else:
        message += "; every declared step agrees, so the way they are put together differs (a sum, a scale, a shortcut)"
    return SpecError([Problem(block.place_of(first), where, message)])


def _does_not_run(block: BoundBlock, x: Tensor, failure: Exception) -> SpecError:
    """Say at which step the structure stops: channels or sizes that do not fit."""
    found = misfit(copy.deepcopy(block.flow), x) or f"does not run: {failure}"
    stops, _, reason = found.partition(": ")
    message = f"{stops} of {block.name}: {reason}"
    return SpecError([Problem(block.group.place, f"structures.{block.group.structure}", message)])


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _outputs(run: Callable[[], Tensor], parts: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def note(name: str, output: object) -> None:
        found.setdefault(name, _plain(output))

    with Hooks() as hooks:
        for name, part in parts.items():
            hooks.after(part, lambda output, name=name: note(name, output))
        _seeded(seed, run)
    return found


def _plain(value: object) -> Tensor:
    return value.detach().clone() if isinstance(value, Tensor) else torch.zeros(0)


def _unlike(mine: Tensor, theirs: Tensor | None) -> bool:
    """Whether a step gave something else; layouts may differ, so values are compared in order of size."""
    if theirs is None or mine.numel() != theirs.numel():
        return True
    if mine.shape == theirs.shape:
        return relative(mine, theirs) > TOLERANCE
    return relative(mine.flatten().sort().values, theirs.flatten().sort().values) > TOLERANCE


def _leaves(module: nn.Module, declared: Sequence[str]) -> list[str]:
    """The innermost modules that are neither declared nor part of one that is."""
    return [
        name
        for name, part in module.named_modules()
        if name and not list(part.children()) and kind_of(part).name != "identity"
        if not any(name == step or name.startswith(f"{step}.") for step in declared)
    ]


def _runs(module: nn.Module, name: str, x: Tensor, block: BoundBlock, seed: int) -> bool:
    part = module.get_submodule(name)
    return bool(_outputs(lambda: module(x.clone(), *block.args, **block.kwargs), {name: part}, seed))


# --- claims -----------------------------------------------------------------------------------------------------------


def check_claims(block: BoundBlock, seed: int = 0) -> None:
    """Fold random diagonals through every `enters` and `leaves`, at the block's size and at others.

    Raises:
        SpecError: a claim is false at a size that the step accepts.
    """
    for name, (opaque, shape) in block.opaques.items():
        for inside, paths in ((True, opaque.enters), (False, opaque.leaves)):
            if paths:
                for size in _claim_shapes(shape):
                    _check_claim(block, name, opaque, inside, size, seed)


def _claim_shapes(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """The recorded shape and some others: windows and paddings show at sizes that do not divide."""
    n, *rest = shape
    if len(rest) == 2:
        return [(n, *rest), (n, max(rest[0] - 3, 2), rest[1])]
    if len(rest) == 3:
        channels_first = (n, rest[0], max(rest[1] - 4, 2), rest[2] + 1)
        channels_last = (n, max(rest[0] - 4, 2), rest[1] + 1, rest[2])
        return [(n, *rest), channels_first, channels_last]
    return [tuple(shape)]


def _check_claim(
    block: BoundBlock, name: str, opaque: language.Opaque, inside: bool, shape: tuple[int, ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain = copy.deepcopy(block.flow).eval()
    folded = copy.deepcopy(block.flow).eval()
    args, kwargs = block.flow.extras.get(name, ((), {}))
    axis = 1 if block.flow.entry == "first" else -1
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        try:
            before = plain.part(name)(x, *args, **kwargs)
            channels = (x if inside else before).shape[axis]
            diagonal = _random_diagonal(channels, generator)
            applied = _apply(diagonal, x, axis) if inside else x
            expected = plain.part(name)(applied, *args, **kwargs)
            expected = expected if inside else _apply(diagonal, expected, axis)
        except (RuntimeError, AssertionError, ValueError):
            if shape == block.opaques[name][1]:
                raise
            return  # a size that the step does not take
        claim = "enters" if inside else "leaves"
        where = f"structures.{block.group.structure}: {claim}"
        paths = opaque.enters if inside else opaque.leaves
        try:
            for path in paths:
                fold_into(folded.part(name), name, path, diagonal, inside)
        except (MergeError, AttributeError) as error:
            raise SpecError([Problem(opaque.place, where, f"{', '.join(paths)}: {error}")]) from None
        error_size = relative(folded.part(name)(x, *args, **kwargs), expected)
    if not error_size <= BOUND:
        message = f"a norm {'before' if inside else 'behind'} {name!r} cannot be folded into {', '.join(paths)}:"
        message += f" wrong by {error_size:.1e} at input {list(shape)}"
        raise SpecError([Problem(opaque.place, where, message)])


def _random_diagonal(channels: int, generator: torch.Generator) -> affine.Affine:
    scale = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
    return affine.diagonal(scale, torch.randn(channels, generator=generator, dtype=torch.float64))


def _apply(diagonal: affine.Affine, x: Tensor, axis: int) -> Tensor:
    assert diagonal.bias is not None
    scale, shift = diagonal.weight.flatten(), diagonal.bias
    if axis == 1:
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
    return x * scale + shift


# --- recipes ----------------------------------------------------------------------------------------------------------


def _check_recipe(
    spec: ArchSpec, block: BoundBlock, recipe: str, blocks: int, seed: int
) -> Sequence[RecipeCheck | Problem]:
    """What a recipe does to a block, or what is wrong with it."""
    try:
        return [_measure_recipe(spec, block, recipe, blocks, seed)]
    except SpecError as error:
        return error.problems
    except MergeError as error:
        return [Problem(spec.recipes[recipe].place, f"recipes.{recipe}", f"block {block.name}: {error}")]


def _measure_recipe(spec: ArchSpec, block: BoundBlock, recipe: str, blocks: int, seed: int) -> RecipeCheck:
    rule = spec.recipes[recipe]
    source = prune(block, rule, resized=True).double().eval()
    randomize(source, seed + 1)
    merged, segments = merge_flow(source, block.channels[0], claims_of(block))
    x = torch.randn(block.input_shape, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    with torch.no_grad():
        records = certify_block(MergedBlock(block.name, source, merged, segments), x)
        output = relative(merged(x), source(x))
    _require(block, recipe, records, output)
    depth = (
        flow_depth(block.flow.nodes, block.flow.named_parts),
        flow_depth(merged.nodes, merged.named_parts),
    )
    if rule.kind == "prune" and depth[1] >= depth[0]:
        message = f"merges to {depth[1]} convolutions and linears in a row, as many as the block of {block.name} has"
        message += "; say `kind: reparam` if that is meant"
        raise SpecError([Problem(rule.place, f"recipes.{recipe}", message)])
    macs = (count_macs(block.flow, x[:1]), count_macs(merged, x[:1]))
    worst = max([record.worst for record in records] + [output])
    return RecipeCheck(
        block.name, blocks, block.group.structure, recipe, block.input_shape, worst, len(records), depth, macs
    )


def _require(block: BoundBlock, recipe: str, records: Sequence[OpRecord], output: float) -> None:
    failures = [f"{record.op} ({', '.join(record.steps)}): {record.worst:.1e}" for record in records if not record.ok]
    if not output <= BOUND:
        failures.append(f"the whole block: {output:.1e}")
    if failures:
        raise CertificateError(f"block {block.name}, recipe {recipe}: not exact at {'; '.join(failures)}")
