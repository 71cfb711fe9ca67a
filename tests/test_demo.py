"""What `make demo` promises: the Makefile's own command lines, and what comes out of them."""

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image

from updp.artefact import verify
from updp.measure import LatencyTable

ROOT = Path(__file__).parents[1]
DEMOS = {"convnext": ("convnext_digits", 5), "deit": ("deit_digits", 3)}
LEARNED = 97.0  # percent of the test digits, of the baseline
LOST = 1.0  # points that pruning may cost


def dry_run(demo: str) -> subprocess.CompletedProcess[str]:
    """What ``make demo`` would run."""
    return dry_make("demo", f"DEMO={demo}")


def dry_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What ``make`` would run; as typed in a shell, even where ``make test`` runs this."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    words = ["make", "--dry-run", "--always-make", *arguments]
    return subprocess.run(words, cwd=ROOT, text=True, capture_output=True, env=env)


def command_of(demo: str) -> list[str]:
    """The words after ``updp`` in the last line of ``make demo``."""
    shown = dry_run(demo)
    assert shown.returncode == 0, shown.stderr
    program, *words = shlex.split(shown.stdout.strip().splitlines()[-1])
    assert Path(program).name == "updp"
    return words


def result(out: Path, stage: str) -> dict:
    return json.loads((out / stage / "result.json").read_text())


def check(out: Path, prune: int) -> None:
    """The finished run keeps what the demo promises."""
    baseline, merge = result(out, "baseline"), result(out, "merge")
    assert baseline["top1"] >= LEARNED
    assert merge["top1"] >= baseline["top1"] - LOST
    assert merge["certificate"]["ok"] and merge["certificate_random"]["ok"]
    subnet = json.loads((out / "search" / "subnet.json").read_text())
    assert len(subnet["choices"]) == prune
    assert merge["after"]["depth"] < merge["before"]["depth"]
    medians = {row.name: row.median_ms for row in LatencyTable.from_dict(merge["latency"]).rows}
    assert medians["merged"] < medians["baseline"]
    for name in ("report.html", "merge/merged.safetensors", "merge/merged.onnx"):
        assert (out / name).stat().st_size > 1000, name
    proof = verify(out / "merge" / "merged.safetensors")
    assert proof.ok and proof.weights_checked


@pytest.mark.parametrize("demo", DEMOS)
def test_the_makefile_runs_what_the_documents_say(demo):
    spec, prune = DEMOS[demo]
    words = command_of(demo)
    assert words[:6] == ["run", spec, "--data", "digits", "--prune", str(prune)]
    assert words[words.index("--out") + 1] == f"runs/demo-{demo}"


def test_an_unknown_demo_is_told_with_the_known_ones():
    done = dry_run("vgg")
    assert done.returncode == 2
    assert "got DEMO=vgg, allowed: convnext, deit" in done.stderr


def test_the_imagenet_demo_takes_a_folder_of_the_user():
    shown = dry_make("demo-imagenet", "IMAGES=my photographs")
    assert shown.returncode == 0, shown.stderr
    program, *words = shlex.split(shown.stdout.strip().splitlines()[-1])
    assert Path(program).name == "updp"
    assert words[:4] == ["calibrate", "tf_efficientnet_lite0", "--weights", "package"]
    assert words[4:6] == ["--data", "folder:my photographs"]
    assert words[6:] == ["--recipe", "full", "--prune", "2", "--out", "runs/demo-imagenet"]
    assert "skimage" not in shown.stdout


def test_the_imagenet_demo_without_a_folder_says_that_it_is_a_smoke_run():
    """Its photographs are copied from the installed packages; each must be there, in colour or grey."""
    shown = dry_make("demo-imagenet")
    assert shown.returncode == 0, shown.stderr
    *before, last = shown.stdout.strip().splitlines()
    assert "--data folder:build/photographs --recipe full --prune 2 --out runs/demo-imagenet-smoke" in last.replace(
        '"', ""
    )
    copied = next(line for line in before if " cp " in line)
    files = shlex.split(copied.partition(" cp ")[2])[:-1]
    assert len(files) >= 10, "fewer are refused"
    assert any("A smoke run" in line and f"{len(files)} photographs" in line for line in before)
    folder = Path(sysconfig.get_path("platlib"))
    if not (folder / "skimage").is_dir():
        pytest.skip("scikit-image is not installed")
    for file in files:
        with Image.open(folder / file) as image:
            assert image.mode in ("RGB", "L") and min(image.size) >= 224, file


@pytest.mark.slow
@pytest.mark.parametrize("demo", DEMOS)
def test_the_demo_keeps_its_promises(demo, tmp_path):
    """Minutes: trains, prunes, merges and measures, exactly as typed, from an empty folder."""
    words = command_of(demo)
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    done = subprocess.run(
        [sys.executable, "-m", "updp", *words],
        cwd=tmp_path, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    check(tmp_path / words[words.index("--out") + 1], DEMOS[demo][1])
