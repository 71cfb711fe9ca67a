"""What solving takes in memory: below what is stated, and the same for ten times the images."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import spec_of

from updp.calibrate import SolveSettings, solve_blocks
from updp.calibrate.memory import equation_bytes, peak_bytes
from updp.frozen import FrozenMap
from updp.structure import create_model
from updp.supernet import build_supernet
from updp.train.cost import LiveBytes

BATCH = 16


def network(name, size=None):
    spec = spec_of(name)
    recipes = {key: dataclasses.replace(recipe, compose="start") for key, recipe in spec.recipes.items()}
    spec = dataclasses.replace(spec, recipes=FrozenMap(recipes))
    return build_supernet(spec, create_model(spec, seed=0, input=size), size=size).eval()


def images(net, number, batch=BATCH):
    """Made as they are asked for: nobody holds them."""
    for seed in range(number):
        yield torch.randn(batch, *net.spec.input, generator=torch.Generator().manual_seed(seed))


def peak(net, choices, number, batch=BATCH):
    known = [*net.parameters(), *net.buffers()]
    with LiveBytes(known) as live:
        solve_blocks(net, choices, net.all_keep(), lambda: images(net, number, batch))
    return live.peak


@pytest.mark.parametrize(
    ("name", "blocks", "recipe", "batch"),
    [
        ("convnext_digits", slice(0, 3), "full", 16),  # equations, maps
        ("convnext_digits", slice(6, 7), "full", 8),  # solving
        ("convnext_digits", slice(6, 7), "pointwise", 8),
        ("convnext_digits", slice(0, 1), "pointwise", 64),  # maps
        ("deit_digits", slice(0, 3), "mlp", 64),
    ],
)
def test_the_peak_is_below_what_is_stated(name, blocks, recipe, batch):
    net = network(name)
    choices = dict.fromkeys(list(net.available)[blocks], recipe)
    stated = peak_bytes(net, choices, batch, SolveSettings())
    found = peak(net, choices, 2, batch) - batch * 4 * net.spec.input[0] * net.spec.input[1] * net.spec.input[2]
    assert 0.3 * stated < found < stated, "nor is the statement an empty one"


def test_ten_times_the_images_take_no_more():
    net = network("convnext_digits")
    choices = dict.fromkeys(list(net.available)[:2], "full")
    few, many = (peak(net, choices, number) for number in (2, 20))
    assert many <= few * 1.01
    flow = net.blocks["stages.0.blocks.0"].choices["full"]
    (operator,) = flow.composed
    entries = 216 * 216 + 216 * 24 + 24 + 216 + 24
    assert equation_bytes(flow) == 2 * 8 * entries, operator


MEASURE = """
import gc, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_calibrate_memory import images, network
from updp.calibrate import SolveSettings, solve_blocks
from updp.calibrate.memory import peak_bytes

def most():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

net = network("convnext_digits")
choices = dict.fromkeys(list(net.available)[:2], "full")
solve_blocks(net, choices, net.all_keep(), lambda: images(net, 1, 2))  # what is loaded on first use
stated = peak_bytes(net, choices, 128, SolveSettings())
gc.collect()
before = most()
solve_blocks(net, choices, net.all_keep(), lambda: images(net, 6, 128))
print(stated, most() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")
def test_the_process_takes_no_more_than_is_stated():
    """As the kernel sees it: what torch takes inside an operation, and does not give back, included."""
    script = MEASURE.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    stated, taken = map(int, done.stdout.split())
    maps = 6 * 128 * 24 * 16 * 16 * 4 * 10  # of all images, of one block: ten steps as wide as its input, at least
    assert taken < stated < 0.6 * maps
