"""A network in which every block can be kept or pruned, with shared weights.

`Supernet` holds the timm model with a `ChoiceBlock` in the place of every block of its spec. A subnet is a selection
of paths through it; finetuning is one subnet whose blend goes from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from updp.errors import InputError, Problem, SpecError, suggest
from updp.kinds import kind_of
from updp.problems import say_once
from updp.recipe import PrunedFlow, prune
from updp.spec import ArchSpec
from updp.stretches import StretchRunner, UnresumableError, Walk, check_stretches
from updp.structure import BoundBlock, bind, create_model, evaluating, set_block
from updp.subnet import KEEP as KEEP
from updp.subnet import SubnetConfig


class ChoiceBlock(nn.Module):
    """One block: the baseline (``keep``) and a pruned flow per recipe; ``blend`` mixes the two.

    ``(1 - blend) * keep(x) + blend * pruned(x)`` (UPDP eq. 2); the shortcut is inside both branches, and drop path
    and dropout draw the same numbers in both.
    """

    def __init__(self, keep: nn.Module, choices: Mapping[str, PrunedFlow]) -> None:
        super().__init__()
        self.keep: nn.Module | None = keep
        self.choices = nn.ModuleDict(choices)
        self.active = KEEP
        self.blend = 1.0

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.active == KEEP or (self.blend == 0.0 and self.keep is not None):
            assert self.keep is not None
            kept: Tensor = self.keep(x, *args, **kwargs)
            return kept
        pruned = self.choices[self.active]
        if self.blend == 1.0 or self.keep is None:
            out: Tensor = pruned(x)
            return out
        replay = _replayed_randomness(x) if self.training and self._drops() else None
        first: Tensor = self.keep(x, *args, **kwargs)
        if replay is not None:
            replay()
        return torch.lerp(first, pruned(x), self.blend)

    def _drops(self) -> bool:
        assert self.keep is not None
        rates = (
            getattr(m, "drop_prob", None) or getattr(m, "p", None)
            for m in self.keep.modules()
            if kind_of(m).name == "drop"
        )
        return any(rates)

    def norms(self) -> Iterator[nn.Module]:
        """The batch norms that the active pruned flow owns; none when the block is kept."""
        if self.active != KEEP:
            flow = self.choices[self.active]
            assert isinstance(flow, PrunedFlow)
            yield from flow.norms()

    def extra_repr(self) -> str:
        return f"active={self.active}, blend={self.blend:g}"


def _replayed_randomness(x: Tensor) -> Callable[[], None]:
    """A function that rewinds the random state of ``x``'s device to now."""
    if x.is_cuda:
        device_state = torch.cuda.get_rng_state(x.device)
        return lambda: torch.cuda.set_rng_state(device_state, x.device)
    state = torch.get_rng_state()
    return lambda: torch.set_rng_state(state)


class Supernet(nn.Module):
    """The model with its choice blocks.

    Attributes:
        model: the timm model; its forward is the supernet's.
        blocks: block name -> `ChoiceBlock`, in order of execution.
        bound: block name -> what the spec bound there.
        available: block name -> recipes that prune it; the first is its default. Blocks whose recipes only
            reparameterize are not counted as prunable.
    """

    def __init__(self, spec: ArchSpec, model: nn.Module, bound: Mapping[str, BoundBlock], *, resized: bool) -> None:
        super().__init__()
        self.spec = spec
        self.model = model
        self.bound = dict(bound)
        self.available: dict[str, tuple[str, ...]] = {}
        self._names: list[str] = []
        flows = _prune_all(spec, bound, resized)
        for name, block in bound.items():
            set_block(model, name, ChoiceBlock(block.module, flows[name]))
            self._names.append(name)
            if recipes := tuple(r for r in block.group.recipes if spec.recipes[r].kind == "prune"):
                self.available[name] = recipes
        self._subnet = self.all_keep()
        self._walkable: bool | None = None  # not known yet

    @property
    def blocks(self) -> dict[str, ChoiceBlock]:
        found = {}
        for name in self._names:
            block = self.model.get_submodule(_first_place(name))
            assert isinstance(block, ChoiceBlock)
            found[name] = block
        return found

    @property
    def recipes(self) -> dict[str, tuple[str, ...]]:
        """Block name -> all its recipes, those too that only reparameterize: what a subnet may choose."""
        return {name: self.bound[name].group.recipes for name in self._names}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out

    # --- which path ---

    @property
    def subnet(self) -> SubnetConfig:
        return self._subnet

    def all_keep(self) -> SubnetConfig:
        return SubnetConfig(self.spec.name, {})

    def all_pruned(self, recipe: str | None = None) -> SubnetConfig:
        return self.configure(list(self.available), recipe)

    def configure(self, blocks: Sequence[str], recipe: str | None = None) -> SubnetConfig:
        """The subnet that prunes these blocks, under their default recipe or the named one."""
        return SubnetConfig(self.spec.name, {name: self.default_choice(name, recipe) for name in blocks})

    def default_choice(self, block: str, recipe: str | None = None) -> str:
        """The recipe that ``--prune`` means for a block: the first listed, or the named one.

        Raises:
            InputError: the block has no such recipe.
        """
        recipes = self.available.get(block, ())
        if recipe is None and recipes:
            return recipes[0]
        if recipe not in recipes:
            raise InputError(f"block {block} of {self.spec.name}: recipe {suggest(str(recipe), recipes)}")
        return recipe

    def sample(self, generator: torch.Generator, count: int | None = None, recipe: str | None = None) -> SubnetConfig:
        """A random subnet with ``count`` pruned blocks; a count left out is drawn from 1 to all but one."""
        names = list(self.available)
        if count is None:
            count = int(torch.randint(1, max(len(names), 2), (), generator=generator))
        chosen = sorted(torch.randperm(len(names), generator=generator)[:count].tolist())
        return self.configure([names[i] for i in chosen], recipe)

    def set_subnet(self, config: SubnetConfig) -> None:
        """Choose the path of the next forward passes.

        Raises:
            InputError: the config is another spec's, or names blocks or recipes that do not exist.
        """
        config.check(self.spec.name, self.recipes)
        for name, block in self.blocks.items():
            block.active = config.choice(name)
        self._subnet = config

    def set_blend(self, value: float) -> None:
        """Mix baseline and pruned flow of every pruned block: 0 = baseline, 1 = pruned (the papers' lambda)."""
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"blend {value} is not in [0, 1]")
        for block in self.blocks.values():
            block.blend = value

    # --- norms ---

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Estimate the statistics of the norms that the current subnet's pruned flows own.

        Block after block: a block's norms are averaged over all batches, in at least float32, before the next
        block sees its output. At any blend. Baseline buffers are never written.
        """
        images = list(batches)
        with evaluating(self.model), torch.no_grad(), torch.autocast(_device_type(self), enabled=False):
            blocks = self.blocks
            walk = self._walk(images)
            for name, block in blocks.items() if walk is None else ((name, blocks[name]) for name in walk.order):
                norms = [norm for norm in block.norms() if isinstance(norm, _BatchNorm)]
                if norms:
                    with estimating(norms):
                        for number, batch in enumerate(images):
                            with _feeding_pruned(block):
                                self.model(batch) if walk is None else walk.to(number, name)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Inside, every block that still has its baseline branch runs that."""
        active = {name: block.active for name, block in self.blocks.items()}
        for block in self.blocks.values():
            block.active = KEEP if block.keep is not None else block.active
        try:
            yield
        finally:
            for name, block in self.blocks.items():
                block.active = active[name]

    def _walk(self, images: Sequence[Tensor]) -> Walk | None:
        """A walk through the model block by block, so that depth costs no more than one pass; None if it has none."""
        runner = self.runner(images) if images else None
        return None if runner is None else Walk(runner, images)

    def runner(self, images: Sequence[Tensor]) -> StretchRunner | None:
        """Runs stretches of the model between its blocks, in inference; None if it cannot be entered there.

        Args:
            images: an input of every shape that will be run.
        """
        if self._walkable is False:
            return None
        try:
            runner = StretchRunner(self.model, self.blocks, images)
            if self._walkable is None:
                with self._kept():  # norms that are not estimated yet may let the signal grow out of all bounds
                    check_stretches(runner, self.model, self.blocks, images[0])
            self._walkable = True
        except UnresumableError:
            self._walkable = False
            return None
        return runner

    # --- towards one subnet ---

    def reduce(self, config: SubnetConfig) -> None:
        """Keep only what one subnet needs; other recipes' modules are dropped."""
        self.set_subnet(config)
        for block in self.blocks.values():
            block.choices = nn.ModuleDict({k: v for k, v in block.choices.items() if k == block.active})

    def free_baseline(self) -> None:
        """Drop the baseline branch of every pruned block: from blend 1 on it costs neither memory nor compute."""
        self.set_blend(1.0)
        for name, block in self.blocks.items():
            if block.active != KEEP:
                block.keep = None
                self.bound[name] = self.bound[name].without_modules()

    def resize(self, progress: float) -> list[str]:
        """Make the kernel changes that are due at this fraction (0..1) of finetuning; returns the weights' names."""
        changed = []
        for name, block in self.blocks.items():
            if block.active != KEEP:
                flow = block.choices[block.active]
                assert isinstance(flow, PrunedFlow)
                changed += [f"{name}.{step}" for step in flow.resize(progress, self.spec.schedule.finetune.epochs)]
        return changed


def _prune_all(spec: ArchSpec, bound: Mapping[str, BoundBlock], resized: bool) -> dict[str, dict[str, PrunedFlow]]:
    """The pruned flows of every block; what is wrong with the recipes is said of all blocks at once."""
    flows: dict[str, dict[str, PrunedFlow]] = {name: {} for name in bound}
    problems: list[tuple[Sequence[str], Problem]] = []
    for name, block in bound.items():
        for recipe in block.group.recipes:
            try:
                flows[name][recipe] = prune(block, spec.recipes[recipe], resized=resized)
            except SpecError as error:
                problems += [([name], problem) for problem in error.problems]
    if problems:
        raise SpecError(say_once(problems))
    return flows


def build_supernet(
    spec: ArchSpec,
    model: nn.Module | None = None,
    *,
    num_classes: int | None = None,
    resized: bool = False,
    size: tuple[int, int, int] | None = None,
    seed: int | None = None,
) -> Supernet:
    """Make a supernet of a model (taken over, not copied), or of a new random one.

    Args:
        resized: give every pruned flow its final weight shapes now.
        size: the (channels, height, width) at which blocks are recorded, when not the spec's own.

    Raises:
        SpecError, MergeError: the spec does not fit the model.
    """
    if model is None:
        model = create_model(spec, num_classes=num_classes, seed=seed, input=size)
    return Supernet(spec, model, bind(spec, model, size), resized=resized)


def _first_place(name: str) -> str:
    """Where a block's module lives: the first place of a slice."""
    head, bracket, rest = name.partition("[")
    return f"{head}.{rest.split(':')[0]}" if bracket else name


def _device_type(module: nn.Module) -> str:
    return next(module.parameters()).device.type


@contextmanager
def estimating(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Inside, these norms average their statistics over every batch that they see, each batch weighing the same."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


class _Fed(Exception):
    """Stops a forward pass at the block that was asked for."""


@contextmanager
def _feeding_pruned(block: ChoiceBlock) -> Iterator[None]:
    """Inside, the model runs up to a block and there its pruned flow: at blend 0, too, where the block skips it."""

    def feed(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        block.choices[block.active](args[0])
        raise _Fed

    handle = block.register_forward_pre_hook(feed)
    try:
        yield
    except _Fed:
        pass
    finally:
        handle.remove()
