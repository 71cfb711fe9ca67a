"""What breaks around a run: the disk, the images. One message, nothing lost, and the same command goes on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Caller, contents, options, tiny_run
from PIL import Image

from updp.data import loader
from updp.data.factory import open_factory  # noqa: F401
from updp.pipeline import context as context_module

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
