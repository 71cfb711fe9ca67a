"""What breaks around a run: the disk, the images. One message, nothing lost, and the same command goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Caller, contents, options, tiny_run
from PIL import Image
from sklearn.datasets import load_digits

from updp.cli.progress import ConsoleWatch
from updp.pipeline import context as context_module
from updp.pipeline import stages

ROOT = Path(__file__).parents[1]
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture
def call(capsys):
    return Caller(capsys)


# --- the disk ---


@pytest.fixture
def on_a_small_disk(tmp_path):
    """Does what `tests/small_disk.py` does in its own mount namespace; gives what each command ended with."""
    trial = [*UNSHARE, "mount", "-t", "tmpfs", "none", str(tmp_path)]
    try:
        tried = subprocess.run(trial, capture_output=True, text=True, timeout=60, check=False)
        reason = tried.stderr.strip() if tried.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        pytest.skip(f"NOT TESTED: this machine lets nobody mount a small file system: {reason}")

    def do(what: str) -> dict[str, dict]:
        command = [*UNSHARE, sys.executable, str(ROOT / "tests" / "small_disk.py"), what, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return do


def is_one_message(ended: dict, *told: str) -> bool:
    """Whether a command ended with status 2 and one line that says all this."""
    return (
        ended["status"] == 2
        and ended["err"].startswith("error: ")
        and len(ended["err"].splitlines()) == 1
        and all(text in ended["err"] for text in told)
    )


def products(ended: dict) -> dict[str, str]:
    """The run's files but those that every command brings up to date."""
    return {name: digest for name, digest in ended["files"].items() if name not in ("log.jsonl", "report.html")}


def test_a_full_disk(on_a_small_disk):
    seen = on_a_small_disk("full")
    assert is_one_message(seen["no space at all"], "cannot", "No space left on device"), seen["no space at all"]
    assert seen["no space at all"]["files"] == {}
    assert seen["begun"]["status"] == 0, seen["begun"]
    assert is_one_message(seen["failed"], "supernet/weights.safetensors: cannot be written", "No space left on device")
    assert products(seen["failed"]) == products(seen["begun"])
    assert "failed, last seen at work" in seen["status"]["out"], seen["status"]
    assert seen["again"]["status"] == 0, seen["again"]
    assert products(seen["begun"]).items() <= products(seen["again"]).items()
    assert "supernet/result.json" in seen["again"]["files"]


def test_a_read_only_file_system(on_a_small_disk):
    seen = on_a_small_disk("readonly")
    assert seen["begun"]["status"] == 0, seen["begun"]
    assert is_one_message(seen["failed"], "run: cannot be written: Read-only file system"), seen["failed"]
    assert seen["failed"]["files"] == seen["begun"]["files"] == seen["nothing to do"]["files"]
    assert seen["nothing to do"]["status"] == 0, seen["nothing to do"]
    assert "finished before" in seen["nothing to do"]["out"]
    assert "waiting" in seen["status"]["out"], seen["status"]
    assert seen["again"]["status"] == 0, seen["again"]
    assert "supernet/result.json" in seen["again"]["files"]


# --- the images ---


@pytest.fixture
def photographs(tmp_path):
    """Digits as files: eight of each class to learn from, two to judge on."""
    digits = load_digits()
    for label in range(10):
        pictures = digits.images[digits.target == label][:10]
        for number, pixels in enumerate(pictures):
            file = tmp_path / "images" / ("train" if number < 8 else "val") / str(label) / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype("uint8")).resize((32, 32)).convert("RGB").save(file)
    return tmp_path / "images"


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_break_or_go_in_the_middle_of_a_run(tmp_path, call, monkeypatch, photographs, workers):
    """A truncated file, then a folder that goes during a run; after each repair the same command goes on."""
    for module in (context_module, stages):
        monkeypatch.setattr(module, "workers_for", lambda spec: workers)
    settings = ["baseline.batch_size=16", "train.hflip=0.5"]  # drawn at random: images are read in every epoch
    arguments = tiny_run(tmp_path / "run", "--data", f"folder:{photographs}", *options(settings), "--until", "baseline")
    broken = photographs / "train" / "3" / "5.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    call.refuses(*arguments, names=(f"{broken}: cannot be read as an image: ", "runcated"))
    told = call("status", tmp_path / "run").out
    assert "failed, last seen at work" in told
    assert f"last error   {broken}: cannot be read as an image" in told
    assert "baseline/result.json" not in contents(tmp_path / "run")
    broken.write_bytes(whole)

    def goes(self: ConsoleWatch, record: dict) -> None:
        photographs.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(ConsoleWatch, "on_epoch", goes)
        err = call.refuses(*arguments, names=(f"error: {photographs}/train/", "cannot be read: No such file or"))
    assert len(err.splitlines()) == 1
    call.refuses(*arguments, names=(f"{photographs}: no such folder",))
    call.refuses("train", tmp_path / "run", names=(f"{photographs}: no such folder",))
    (tmp_path / "elsewhere").rename(photographs)
    done = call(*arguments)
    assert done.status == 0, done
    assert "baseline/result.json" in contents(tmp_path / "run")
