"""Random structures under random recipes: merged exactly at two sizes, or refused with a message; nothing else."""

import copy
import re
from collections import Counter
from dataclasses import dataclass, field

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from networks import merged_ops, merged_tensors
from random_structures import Example, RandomBlock, bind_block, examples
from torch import Tensor, nn

from updp.affine import Same, pads_of
from updp.certificate import BOUND, certify_block, relative
from updp.errors import MergeError, SpecError
from updp.flow import Call, Parallel, Run, walk
from updp.kinds import kind_of
from updp.layers import PaddedConv2d, conv_padding, pad_map
from updp.merging import MergedBlock, merge_flow
from updp.randomize import randomize
from updp.recipe import prune
from updp.spec import Recipe
from updp.spec.language import Append, Replace, Resize, Step, Sum

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# Every message that a random structure may be refused with.
REFUSALS = [
    r"at \w+.*: a padded operator after a \d+x\d+ one is wrong in the border ring",
    r"at \w+.*: a bias per tap knows only the map it was made for",
    r"at \w+.*: SAME padding (behind another padded|with stride > 1 and another branch)",
    r"Same\(.*\) in front of the run is not the SAME padding of the merged convolution",
    r"the padding of \w+.* cannot move to the front of the run",
    r"SAME padding of \w+ mixed with fixed padding",
    r"resize: \w+, \d+x\d+ with padding .* has no centre \d+x\d+ of equal output",
    r"recipes.random: block 0: merge: (no convolution or linear layer|.* are not steps of one flow|.* is not affine)",
    r"recipes.random: block 0: append after \w+",
]


def merge_example(example: Example) -> MergedBlock:
    """As `networks.merge_block`: a copy in float64 with everything random, norms of the pruned flow included."""
    source = copy.deepcopy(prune(example.block, example.recipe, resized=True)).double().eval()
    randomize(source, example.seed + 1)
    merged, segments = merge_flow(source, example.block.channels[0])
    return MergedBlock("0", source, merged, segments)


def check_exact(example: Example, block: MergedBlock) -> None:
    """At two input sizes: declared = module, same shape as before pruning, merged = pruned, every certificate."""
    for other in (False, True):
        x = example.input(other)
        with torch.no_grad():
            baseline = example.block.module(x)
            assert relative(example.block.flow.eval()(x), baseline) <= 1e-12
            output = block.source(x)
            assert output.shape == baseline.shape
            assert relative(block.merged(x), output) <= BOUND
            records = certify_block(block, x)
        assert [record.op for record in records] == [segment.name for segment in merged_ops(block.segments)]
        for record in records:
            assert record.ok, record
            assert record.ring is not None
    check_saved(example, block)


def check_saved(example: Example, block: MergedBlock) -> None:
    """What is built without values has the same shapes, and gives the same bits once it has the values."""
    hollow, segments = merge_flow(block.source, example.block.channels[0], values=False)
    state = block.merged.state_dict()
    assert segments == block.segments
    assert {name: tensor.shape for name, tensor in hollow.state_dict().items()} == {
        n: t.shape for n, t in state.items()
    }
    hollow.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    x = example.input()
    with torch.no_grad():
        assert torch.equal(hollow(x), block.merged(x))


# --- what happened, counted ---


def features_of(example: Example, block: MergedBlock) -> set[str]:
    """What the merged runs of more than one operator have."""
    found = set()
    for node in walk(block.source.nodes):
        if not isinstance(node, Run):
            continue
        parts = [block.source.part(n.name) for n in walk((node,)) if isinstance(n, Call)]
        operators = sum(kind_of(part).is_operator for part in parts)
        if operators > 1:
            found |= features_of_run(example, block, node)
    if not found:
        return set()
    rows, columns = example.block.input_shape[2:] if example.block.flow.entry == "first" else example.other_size
    found |= {"oblong"} if rows != columns else set()
    found |= {"odd side"} if rows % 2 or columns % 2 else set()
    found |= {"above 128"} if max(rows, columns) > 128 else set()
    found |= {"channels last"} if example.block.flow.entry == "last" else set()
    found |= {f"padding {example.recipe.padding}", example.recipe.kind}
    found |= {"partial merge"} if example.recipe.merge != "all" else set()
    found |= {"resized"} if example.recipe.resize else set()
    if any(getattr(part, "taps", None) is not None for part in block.merged.parts.values()):
        found.add("bias map")
    return found


def features_of_run(example: Example, block: MergedBlock, run: Run) -> set[str]:
    found = set()
    names = [node.name for node in walk((run,)) if isinstance(node, Call)]
    if any(name.startswith("pad.") for name in names):
        found.add("padding moved")
    wide = 0
    for name in names:
        conv = getattr(example.block.module, name, None)
        if isinstance(conv, nn.Conv2d):
            found |= features_of_conv(conv)
            wide += conv.groups == conv.in_channels > 1 and max(conv.kernel_size) > 1
            if conv.stride != block.source.part(name).stride:
                found.add("stride moved")
        elif name in block.source.named_parts:
            found.add(f"{kind_of(block.source.part(name)).name} inside")
    if wide > 1:
        found.add("depthwise chain")
    for node in walk(run.flow):
        if isinstance(node, Parallel):
            found |= features_of_sum(example, node)
    return found


def features_of_conv(conv: nn.Conv2d) -> set[str]:
    padding = conv_padding(conv)
    tests = {
        "SAME, dynamic": isinstance(padding, Same),
        "Conv2dSame": isinstance(conv, timm.layers.Conv2dSame),
        "PaddedConv2d": isinstance(conv, PaddedConv2d),
        "asymmetric": isinstance(padding, tuple) and padding[::2] != padding[1::2],
        "even kernel": any(k % 2 == 0 for k in conv.kernel_size),
        "oblong kernel": conv.kernel_size[0] != conv.kernel_size[1],
        "dilation": any(k > 1 and d > 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)),
        "depthwise": conv.groups == conv.in_channels > 1,
        "grouped": 1 < conv.groups < conv.in_channels,
        "oblong stride": conv.stride[0] != conv.stride[1],
        **{f"stride {s}": conv.stride == (s, s) for s in (2, 3, 4)},
    }
    return {name for name, holds in tests.items() if holds}


def features_of_sum(example: Example, node: Parallel) -> set[str]:
    found = {"sum"} | ({"named sum"} if node.name else set()) | ({"identity shortcut"} if () in node.flows else set())
    if any(isinstance(inner, Parallel) for flow in node.flows for inner in walk(flow)):
        found.add("nested sum")
    for flow in node.flows:
        convs = [getattr(example.block.module, n.name, None) for n in flow if isinstance(n, Call)]
        convs = [conv for conv in convs if isinstance(conv, nn.Conv2d)]
        if len(convs) == 1 and convs[0].kernel_size == (1, 1) and convs[0].stride != (1, 1):
            found.add("strided 1x1 shortcut")
    return found


WANTED = {
    "SAME, dynamic", "Conv2dSame", "PaddedConv2d", "asymmetric", "even kernel", "oblong kernel", "dilation",
    "depthwise", "grouped", "depthwise chain", "stride 2", "stride 3", "stride 4", "oblong stride", "sum",
    "named sum", "nested sum",
    "identity shortcut", "strided 1x1 shortcut", "linear inside", "scale inside", "batchnorm inside", "drop inside",
    "oblong", "odd side", "above 128", "channels last", "padding first", "padding keep", "padding moved",
    "stride moved", "partial merge", "bias map", "resized", "prune", "reparam",
}  # fmt: skip


@dataclass
class Tally:
    """Examples by outcome, and the features of those whose merged runs have more than one operator."""

    accepted: int = 0
    merged: int = 0
    refused: int = 0
    features: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)

    def run(self, example: Example) -> None:
        try:
            block = merge_example(example)
        except (MergeError, SpecError) as error:
            self.refused += 1
            self.messages.append(str(error))
            return
        check_exact(example, block)
        features = features_of(example, block)
        self.accepted += 1
        self.merged += bool(features)
        self.features.update(features)


def random_run(count: int, plain: bool = False):
    """Settings of a run that is the same every time; building whole blocks is slow, and meant to be."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    def decorate(test):
        chosen = settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=quiet)
        return chosen(given(examples(plain))(test))

    return decorate


def test_random_structures_merge_exactly_or_are_refused():
    tally = Tally()

    @random_run(550)
    def check(example):
        tally.run(example)

    check()
    assert set(tally.features) >= WANTED, WANTED - set(tally.features)
    assert [m for m in tally.messages if not any(re.match(pattern, m) for pattern in REFUSALS)] == []
    total = tally.accepted + tally.refused
    assert total >= 550
    assert tally.accepted >= 0.6 * total, tally
    assert tally.merged >= 0.15 * total, tally


def test_plain_chains_are_never_refused():
    """Fixed paddings of any kind, whatever recipes shipped with updp say: padding first, merge all."""
    tally = Tally()

    @random_run(150, plain=True)
    def check(example):
        assert (example.recipe.padding, example.recipe.merge) == ("first", "all")
        tally.run(example)
        assert tally.refused == 0

    check()
    assert tally.merged >= 75, tally
    wanted = {"padding moved", "stride moved", "asymmetric", "even kernel", "dilation", "depthwise chain", "stride 4"}
    assert wanted <= set(tally.features), wanted - set(tally.features)


# --- the certificate sees every mistake ---


def visible(part: nn.Module, name: str, x: Tensor) -> Tensor:
    """Where a merged tensor reads enough of the input ``x`` of its operator for a small change to show, as a mask."""
    tensor = getattr(part, name)
    if name == "bias":
        return torch.ones_like(tensor, dtype=torch.bool)
    if isinstance(part, nn.Linear):
        return (x.abs().flatten(0, -2).amax(dim=0) >= 0.3 * x.abs().max()).expand_as(tensor)
    pads = pads_of(conv_padding(part), *x.shape[-2:])
    read = pad_map(x.abs() if name == "weight" else torch.ones_like(x[:, :1]), pads)
    taps = F.unfold(read, part.kernel_size, part.dilation, 0, part.stride).amax(dim=(0, 2))
    seen = (taps >= 0.3 * x.abs().max() if name == "weight" else taps > 0).reshape(-1, *part.kernel_size)
    if name == "taps":
        return seen.expand_as(tensor)
    groups = seen.reshape(part.groups, -1, *part.kernel_size)
    return groups.repeat_interleave(part.out_channels // part.groups, dim=0)


def test_one_changed_element_fails_its_operators_certificate_and_no_other():
    """Off by 1e-6 of the tensor's largest, in weights, biases and bias maps of random merged operators."""
    mutated: Counter[str] = Counter()

    @random_run(150)
    def check(example):
        try:
            block = merge_example(example)
        except (MergeError, SpecError):
            return
        x = example.input()
        generator = torch.Generator().manual_seed(example.seed)
        for target in merged_tensors(block, {}):
            seen = visible(target.module, target.name, input_of(target.module, block, x)).reshape(-1).nonzero()[:, 0]
            if not len(seen):
                continue  # a kernel wider than its map, whose taps here all lie on padding
            where = seen[torch.randint(len(seen), (), generator=generator)]
            values = target.tensor.view(-1)
            kept = values[where].clone()
            values[where] += 1e-6 * values.abs().max()
            with torch.no_grad():
                failed = [record.op for record in certify_block(block, x) if not record.ok]
            values[where] = kept
            assert failed == [target.op], f"{target.op} {target.name}[{int(where)}]"
            mutated[target.name] += 1

    check()
    assert mutated["weight"] >= 90, mutated
    assert mutated["bias"] >= 80, mutated
    assert mutated["taps"] >= 3, mutated


def input_of(part: nn.Module, block: MergedBlock, x: Tensor) -> Tensor:
    inputs = []
    handle = part.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        block.merged(x)
    handle.remove()
    return inputs[0]


# --- combinations that a random search rarely meets ---


def toy(flow, modules: dict[str, nn.Module], *, size=(37, 46), channels=4, other_size=(61, 34), **recipe) -> Example:
    """A block from lists: a string is a step, a tuple of lists a sum; activations ``act…`` are replaced."""
    block = RandomBlock()
    for name, module in modules.items():
        setattr(block, name, module)

    def steps(items):
        return tuple(
            Sum(tuple(steps(branch) for branch in item), "mix") if isinstance(item, tuple) else Step(item)
            for item in items
        )

    replace = {name: Replace("identity") for name in modules if name.startswith("act")}
    rule = Recipe("random", replace, recipe.pop("resize", {}), (Append(("relu",)),), kind="reparam", **recipe)
    return bind_block(block, steps(flow), rule, size, channels, other_size)


def conv(kernel=1, stride=1, padding=0, *, dilation=1, groups=1, bias=True):
    common = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    if isinstance(padding, tuple):
        return PaddedConv2d(4, 4, kernel, pads=padding, tap_bias=False, **common)
    if padding == "SAME":
        return timm.layers.Conv2dSame(4, 4, kernel, **common)
    return nn.Conv2d(4, 4, kernel, padding=padding, **common)


def tapped():
    """A convolution that came out of a merge itself."""
    return PaddedConv2d(4, 4, 3, pads=(1, 1, 1, 1), tap_bias=True)


def chain(*convs, **recipe):
    """A chain of convolutions ``c0, c1, …`` with an activation to replace between the first two."""
    names = [f"c{i}" for i in range(len(convs))]
    flow = [names[0], "act", *names[1:]]
    return flow, dict(zip(names, convs, strict=True), act=nn.ReLU()), recipe


EXACT = {
    "a biased 1x1, then a padded depthwise 3x3 where it stands": (
        chain(conv(), conv(3, 1, 1, groups=4), padding="keep"),
        ((3, 3), (1, 1), (1, 1, 1, 1), True),
    ),
    "the same at stride 2, then another 1x1": (
        chain(conv(), conv(3, 2, 1, groups=4), conv(), padding="keep"),
        ((3, 3), (2, 2), (1, 1, 1, 1), True),
    ),
    "SAME at stride 2 behind a biased 1x1, where it stands": (
        chain(conv(), conv(3, 2, "SAME", groups=4), conv(), padding="keep"),
        ((3, 3), (2, 2), Same((3, 3), (2, 2)), True),
    ),
    "SAME at stride 3, moved to the front": (
        chain(conv(), conv(5, 3, "SAME", groups=4), conv()),
        ((5, 5), (3, 3), Same((5, 5), (3, 3)), False),
    ),
    "two SAME convolutions at stride 2": (
        chain(conv(3, 2, "SAME"), conv(3, 2, "SAME")),
        ((5, 5), (4, 4), Same((5, 5), (4, 4)), False),
    ),
    "a 1x1 SAME at stride 2, which pads nothing, then 3x3": (
        chain(conv(1, 2, "SAME"), conv(3, 1, 1)),
        ((3, 3), (2, 2), (1, 1, 1, 1), False),
    ),
    "stride 4": (chain(conv(), conv(7, 4, 3), conv()), ((7, 7), (4, 4), (3, 3, 3, 3), False)),
    "stride 4 by two strides of 2": (chain(conv(3, 2, 1), conv(3, 2, 1)), ((5, 5), (4, 4), (2, 2, 2, 2), False)),
    "an even kernel with asymmetric padding": (
        chain(conv(), conv(4, 2, (1, 2, 0, 3)), conv(2, 1, (0, 1, 1, 0))),
        ((5, 5), (2, 2), (1, 3, 1, 3), False),
    ),
    "a dilated depthwise 3x3 behind a strided 3x3": (
        chain(conv(3, 2, 1), conv(3, 1, 2, dilation=2, groups=4)),
        ((7, 7), (2, 2), (3, 3, 3, 3), False),
    ),
    "a dilated depthwise 3x3 behind an unpadded strided one keeps its stride": (
        chain(conv(3, 2), conv(3, 1, dilation=2, groups=4)),
        ((11, 11), (2, 2), (0, 0, 0, 0), False),
    ),
    "an unpadded 3x3 behind a padded strided one, padding moved, stride kept": (
        chain(conv(), conv(3, 2, 1), conv(3)),
        ((7, 7), (2, 2), (1, 1, 1, 1), False),
    ),
    "a depthwise chain": (
        chain(*(conv(3, 1, 1, groups=4) for _ in range(3))),
        ((7, 7), (1, 1), (3, 3, 3, 3), False),
    ),
    "a kernel cropped from 5x5 to 3x3 behind a dilated one": (
        chain(conv(3, 1, 3, dilation=3), conv(5, 1, 2), resize={"c1": Resize(3)}),
        ((9, 9), (1, 1), (4, 4, 4, 4), False),
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_rare_chains_are_exact(case):
    (flow, modules, recipe), (kernel, stride, padding, taps) = EXACT[case]
    example = toy(flow, modules, **recipe)
    block = merge_example(example)
    check_exact(example, block)
    merged = block.merged.part("merged.0")
    assert (merged.kernel_size, merged.stride, conv_padding(merged)) == (kernel, stride, padding)
    assert (getattr(merged, "taps", None) is not None) == taps
    assert merged.groups == (4 if case == "a depthwise chain" else 1)


def steps(**modules):
    return dict(modules, act=nn.ReLU())


EXACT_SUMS = {
    "a strided 1x1 shortcut beside two 3x3": (
        [(["a", "act", "b"], ["c"])],
        steps(a=conv(3, 2, 1), b=conv(3, 1, 1), c=conv(1, 2)),
    ),
    "a strided 1x1 SAME shortcut beside a 3x3": ([(["a", "act"], ["c"])], steps(a=conv(3, 2, 1), c=conv(1, 2, "SAME"))),
    "SAME beside SAME at stride 2": ([(["a", "act"], ["c"])], steps(a=conv(3, 2, "SAME"), c=conv(3, 2, "SAME"))),
    "a padded sum behind a strided 1x1": (["c", (["a", "act"], [])], steps(c=conv(1, 2), a=conv(3, 1, 1))),
    "a strided sum, then what pads nothing": (
        [(["a", "act"], ["c"]), "b"],
        steps(a=conv(3, 2, 1), c=conv(1, 2), b=conv(3)),
    ),
    "padding behind a sum of 1x1": ([(["a", "act"], []), "b"], steps(a=conv(), b=conv(3, 2, 1))),
    "branches of other dilations": (
        [(["a", "act"], ["b"], [])],
        steps(a=conv(3, 1, 3, dilation=3), b=conv(5, 1, 2)),
    ),
}


@pytest.mark.parametrize("case", EXACT_SUMS)
def test_rare_sums_are_exact(case):
    flow, modules = EXACT_SUMS[case]
    example = toy(flow, modules)
    block = merge_example(example)
    check_exact(example, block)
    assert [segment.name for segment in merged_ops(block.segments)] == ["merged.0"]


@pytest.mark.parametrize("padding", ["first", "keep"])
def test_a_bias_per_tap_in_front_of_a_run_stays(padding):
    flow, modules, recipe = chain(tapped(), conv(3), padding=padding)
    example = toy(flow, modules, **recipe)
    block = merge_example(example)
    check_exact(example, block)
    assert block.merged.part("merged.0").taps.shape == (4, 5, 5)


REFUSED = {
    "SAME at stride 2 beside a 1x1 shortcut": (
        ([(["a", "act"], ["c"])], steps(a=conv(3, 2, "SAME"), c=conv(1, 2)), {}),
        "at mix: SAME padding with stride > 1 and another branch have no fixed alignment",
    ),
    "3x3 behind 3x3, both padded where they stand": (
        chain(conv(3, 1, 1), conv(3, 1, 1), padding="keep"),
        r"at c1: a padded operator after a 3x3 one .*padding: first",
    ),
    "SAME and fixed padding": (
        chain(conv(3, 1, 1), conv(3, 2, "SAME")),
        "SAME padding of c1 mixed with fixed padding in one run",
    ),
    "SAME behind an unpadded 3x3": (
        chain(conv(3), conv(3, 2, "SAME")),
        "the padding of c1 cannot move .* beside SAME padding",
    ),
    "SAME at stride 2 behind a strided 1x1 where it stands": (
        chain(conv(1, 2), conv(3, 2, "SAME"), padding="keep"),
        "at c1: SAME padding behind another padded or strided operator",
    ),
    "padding behind a strided sum": (
        ([(["a", "act"], ["c"]), "b"], steps(a=conv(3, 2, 1), c=conv(1, 2), b=conv(3, 1, 1)), {}),
        "the padding of b cannot move .* behind a stride",
    ),
    "padding behind an unpadded 3x3 behind a stride": (
        chain(conv(3, 2, 1), conv(3), conv(3, 1, 1)),
        "the padding of c0, c2 cannot move .* behind a stride",
    ),
    "a bias per tap behind another convolution": (chain(conv(), tapped()), "c1 has a bias per tap"),
    "a bias map inside a sum behind a 3x3": (
        (["c", (["a", "act", "b"], [])], steps(c=conv(3, 1, 1), a=conv(), b=conv(3, 1, 1)), {"padding": "keep"}),
        "at mix: a bias per tap knows only the map",
    ),
    "no padding to crop with the kernel": (
        chain(conv(3), conv(3), resize={"c0": Resize(1)}),
        r"resize: c0, 3x3 with padding \(0, 0, 0, 0\) .* has no centre 1x1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rare_structures_are_refused(case):
    (flow, modules, recipe), message = REFUSED[case]
    with pytest.raises(MergeError, match=message):
        merge_example(toy(flow, modules, **recipe))
