"""Who works on a run, what its log keeps, and what `updp status` says of it."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from commands import Caller, started, tiny_run
from fake_run import STAGES, write_run

from updp.errors import InputError
from updp.pipeline import lock as lock_module
from updp.pipeline import scalars as scalars_module
from updp.pipeline.lock import check_free, holder, locked
from updp.pipeline.log import logged
from updp.pipeline.scalars import Scalars, with_scalars
from updp.pipeline.watch import Pace, Relay, Watch
from updp.report import report
from updp.report.progress import LOG, read_progress

ROOT = Path(__file__).parents[1]


@pytest.fixture
def call(capsys):
    return Caller(capsys)


class Notes(Watch):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def events(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / LOG).read_bytes().split(b"\n") if line]


# --- the lock ---


def test_a_second_run_is_refused_and_told_who_holds_the_lock(tmp_path):
    with locked(tmp_path, Watch()):
        held = holder(tmp_path)
        assert (held.pid, held.host is not None) == (os.getpid(), True)
        with pytest.raises(InputError, match=f"another run is at work here .process {os.getpid()} on "):
            locked(tmp_path, Watch()).__enter__()
        with pytest.raises(InputError, match="wait for its end, or end it"):
            check_free(tmp_path)
    assert holder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, Watch()):
        pass


def test_only_the_first_of_several_processes_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path, Watch()), logged(tmp_path, ["baseline"], Watch()):
        check_free(tmp_path)
        assert list(tmp_path.iterdir()) == []


HOLD = """
import os, sys, time
from pathlib import Path
from updp.pipeline.lock import locked
from updp.pipeline.watch import Watch
with locked(Path(sys.argv[1]), Watch()):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


def test_the_lock_goes_with_a_killed_process_though_its_workers_live_on(tmp_path, call):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = 0
    try:
        worker = int(process.stdout.readline())
        assert holder(tmp_path).pid == process.pid
        process.kill()
        process.wait()
        os.kill(worker, 0)  # is still there
        for _ in range(100):  # the worker lets go of it in its first steps
            if holder(tmp_path) is None:
                break
            time.sleep(0.1)
        assert holder(tmp_path) is None
        assert (tmp_path / "lock").exists()
        with locked(tmp_path, Watch()):
            assert holder(tmp_path).pid == os.getpid()
    finally:
        if worker:
            os.kill(worker, signal.SIGKILL)  # first: it holds the pipe
        process.kill()
        process.communicate()


def test_a_lock_whose_file_says_nothing_holds_all_the_same(tmp_path):
    with (tmp_path / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another run is at work here \(another process\)"):
            locked(tmp_path, Watch()).__enter__()
    for text in ("[]", "{", '{"host": "a", "pid": "b", "command": "c", "since": "d"}'):
        (tmp_path / "lock").write_text(text)
        assert holder(tmp_path) is None
        with (tmp_path / "lock").open() as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            assert str(holder(tmp_path)) == "another process"


def test_without_locks_a_note_and_the_work_goes_on(tmp_path, monkeypatch):
    def refuses(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "flock", refuses)
    watch = Notes()
    with locked(tmp_path, watch):
        pass
    assert len(watch.notes) == 1
    assert watch.notes[0].startswith("no lock: No locks available")


def test_a_lock_removed_and_made_anew_is_another_lock(tmp_path):
    with locked(tmp_path, Watch()):
        descriptor = os.open(tmp_path / "lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # of the file that was removed: nobody's
    with locked(tmp_path, Watch()):
        assert holder(tmp_path).pid == os.getpid()
    os.close(descriptor)


# --- the log ---


def work(directory: Path, watch: Watch, *, steps: int = 4) -> None:
    """What a stage tells, in a moment."""
    watch.on_stage("finetune", 4, 5)
    watch.on_start(steps, "finetune")
    for step in range(1, steps + 1):
        watch.on_step({"epoch": 1, "step": step, "lr": 0.1, "loss": float("nan")})
    with watch.task("scoring", 10) as advance:
        advance(10)
    watch.on_epoch({"epoch": 1, "train_loss": 0.5, "top1": 91.5, "seconds": 3.0})
    watch.on_end()


def test_the_log_has_a_line_for_each_event(tmp_path):
    seen = Notes()
    with logged(tmp_path, ["finetune"], seen) as watch:
        work(tmp_path, watch)
        watch.on_note("two\nlines\u2028here \ud800")
        watch.on_result("finetune", {"top1": 91.5, "history": [1, 2], "best": {"loss": 1.0, "rows": []}}, fresh=True)
    found = events(tmp_path)
    names = ["run", "stage", "start", "step", "epoch", "note", "result", "end"]
    assert [event["event"] for event in found] == names
    assert {"updp", "torch", "python", "host", "pid", "command", "processes"} <= set(found[0])
    assert found[3]["loss"] is None
    assert (found[4]["top1"], found[4]["stage"]) == (91.5, "finetune")
    assert (found[6]["best"], "history" in found[6]) == ({"loss": 1.0}, False)
    assert seen.notes == ["two\nlines\u2028here \ud800"]
    assert all(datetime.fromisoformat(event["time"]).utcoffset().total_seconds() == 0 for event in found)
    assert (tmp_path / LOG).read_bytes().count(b"\n") == len(names)


def test_a_line_cut_short_is_mended_and_passed_over(tmp_path):
    (tmp_path / LOG).write_text('{"event": "run"}\n{"event": "st')
    with logged(tmp_path, ["baseline"], Watch()):
        pass
    lines = (tmp_path / LOG).read_text().splitlines()
    assert lines[1] == '{"event": "st'
    assert [json.loads(line)["event"] for line in (lines[0], *lines[2:])] == ["run", "run", "end"]
    assert read_progress(tmp_path).ended == "end"


@pytest.mark.parametrize(
    ("raised", "event", "key", "told"),
    [
        (KeyboardInterrupt(), "interrupted", "by", "Ctrl-C"),
        (InputError("a.jpg: gone"), "error", "text", "a.jpg: gone"),
        (ZeroDivisionError(), "error", "text", "ZeroDivisionError"),
    ],
)
def test_the_log_ends_with_what_ended_the_run(tmp_path, raised, event, key, told):
    with pytest.raises(type(raised)), logged(tmp_path, ["baseline"], Watch()):
        raise raised
    assert (events(tmp_path)[-1]["event"], events(tmp_path)[-1][key]) == (event, told)


def test_a_log_that_cannot_be_written_is_one_note(tmp_path):
    watch = Notes()
    (tmp_path / LOG).mkdir()
    with logged(tmp_path, ["finetune"], watch) as log:
        work(tmp_path, log)
    assert len(watch.notes) == 1
    assert watch.notes[0].startswith("the log is not complete: Is a directory")


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    """Elapsed times come from a clock that only goes on; so do the pace of the log and the time left."""
    with logged(tmp_path, ["finetune"], Watch()) as log:
        log.on_stage("finetune", 4, 5)
        log.on_start(10, "finetune")
        for step in (1, 2, 3):
            monkeypatch.setattr(time, "time", lambda step=step: 1e9 - step * 1e6)
            monkeypatch.setattr(log._pace, "due", lambda: True)
            log.on_step({"epoch": 1, "step": step})
            time.sleep(0.01)
    elapsed = [event["elapsed"] for event in events(tmp_path)]
    assert elapsed == sorted(elapsed)
    assert 0 < read_progress(tmp_path).left < 60


def test_lines_of_progress_are_paced(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace()
    pace.begin()
    written = []
    for tenth in range(60_000):  # a hundred minutes
        now[0] = 100.0 + tenth / 10
        if pace.due():
            written.append(now[0])
    gaps = [after - before for before, after in pairwise(written)]
    assert written[0] == 100.0
    assert min(gaps) == pytest.approx(1.0, abs=0.11)
    assert max(gaps) == pytest.approx(10.0, abs=0.11)


def test_a_relay_hands_everything_on():
    assert [name for name in vars(Watch) if name.startswith(("on_", "task")) and name not in vars(Relay)] == []


# --- status ---


def seen_by_status(call, *directories: Path) -> dict:
    done = call("status", *directories, "--json")
    assert done.status == 0, done
    (found,) = json.loads(done.out)
    return found


def test_a_finished_run(tmp_path, call):
    run = write_run(tmp_path / "run")
    found = seen_by_status(call, run)
    assert (found["state"], found["stage"], found["work"], found["holder"]) == ("finished", None, None, None)
    assert [stage["stage"] for stage in found["stages"] if stage["finished"]] == list(STAGES)
    assert found["best"] == {"top1": 98.6111, "of": "baseline"}
    shown = call("status", run).out
    assert "finished" in shown
    assert "top-1 98.33 %  (certificate holds)" in shown
    assert "\x1b" not in shown


def test_a_run_at_work(tmp_path, call):
    run = write_run(tmp_path / "run", STAGES[:3])
    with locked(run, Watch()), logged(run, STAGES, Watch()) as log:
        log._pace.due = lambda: True
        log.on_stage("finetune", 4, 5)
        log.on_start(100, "finetune")
        for step in range(1, 26):
            log.on_step({"epoch": 1 + step // 10, "step": step})
            time.sleep(0.002)
        log.on_epoch({"epoch": 2, "top1": 99.25})
        log.on_note("the disk is nearly full")
        found = seen_by_status(call, run)
        shown = call("status", run).out
    assert (found["state"], found["stage"], found["holder"]["pid"]) == ("running", "finetune", os.getpid())
    work = found["work"]
    assert (work["done"], work["total"], work["epoch"]) == (25, 100, 2)
    assert 0.002 * 75 <= work["seconds_left"] < 60
    assert found["best"] == {"top1": 99.25, "of": "finetune, epoch 2"}
    assert found["last"]["text"] == "the disk is nearly full"
    assert f"running: process {os.getpid()} on " in shown
    assert "epoch 2, step 25 of 100, " in shown
    assert " left" in shown
    assert "last note    the disk is nearly full" in shown


@pytest.mark.parametrize(
    ("ends", "state"),
    [
        ([], "killed"),
        ([{"event": "interrupted", "by": "SIGTERM"}], "stopped"),
        ([{"event": "error", "text": "no space"}], "failed"),
        ([{"event": "end"}], "waiting"),
    ],
)
def test_a_run_that_is_not_at_work(tmp_path, call, ends, state):
    run = write_run(tmp_path / "run", STAGES[:1])
    lines = [
        {"event": "run", "command": "updp run it", "elapsed": 0}, {"event": "stage", "stage": "supernet"},
        {"event": "start", "stage": "supernet", "title": "supernet", "steps": 10, "elapsed": 1},
        {"event": "step", "stage": "supernet", "step": 1, "epoch": 1, "elapsed": 2},
        {"event": "step", "stage": "supernet", "step": 5, "epoch": 2, "elapsed": 3}, *ends,
    ]  # fmt: skip
    (run / LOG).write_text("\n".join(["nonsense", *map(json.dumps, lines), '{"cut', "[]", ""]))
    found = seen_by_status(call, run)
    assert (found["state"], found["stage"]) == (state, "supernet")
    assert (found["work"]["done"], found["work"]["seconds_left"]) == (5, None)
    shown = call("status", run).out
    assert shown.splitlines()[1].startswith(state)
    assert "epoch 2, step 5 of 10" in shown
    assert " left" not in shown
    assert "to go on     updp run it" in shown


def test_a_run_without_a_log(tmp_path, call):
    found = seen_by_status(call, write_run(tmp_path / "run", STAGES[:1]))
    assert (found["state"], found["stage"], found["work"]) == ("waiting", "supernet", None)


def test_what_is_no_run_is_told_beside_what_is(tmp_path, call):
    run = write_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    call.refuses("status", tmp_path / "other", names=(str(tmp_path / "other"), "not a run directory"))
    call.refuses("status", tmp_path / "none", names=("no such directory",))
    done = call("status", tmp_path / "other", run, tmp_path / "none")
    assert done.status == 2
    assert "finished" in done.out
    assert done.err.startswith("error: 2 problems\n")
    assert list((tmp_path / "other").iterdir()) == []


# --- a real process: at work, asked for, refused to others, and ended as schedulers do ---


def test_a_real_run_is_seen_and_locked_and_ends_with_sigterm(tmp_path, call):
    out = tmp_path / "out"
    arguments = tiny_run(out, "--set", "baseline.epochs=500")
    process = started(arguments)
    try:
        assert process.stdout is not None
        assert any(text.startswith("  epoch") for text in process.stdout)
        found = seen_by_status(call, out)
        assert (found["state"], found["stage"], found["holder"]["pid"]) == ("running", "baseline", process.pid)
        assert found["best"]["of"].startswith("baseline, epoch ")
        told = (str(out), "another run is at work here", f"process {process.pid} on", "--set baseline.epochs=500")
        call.refuses(*arguments, names=told)
        call.refuses("train", out, names=told)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 143, err
    assert err.startswith("Terminated (SIGTERM). Finished stages are kept.")
    assert "updp run" in err.splitlines()[1]
    assert len(err.splitlines()) == 2
    assert seen_by_status(call, out)["state"] == "stopped"
    assert not (out / "lock").exists()


# --- TensorBoard ---


class Writer:
    """In the place of torch's writer, which needs the package."""

    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []
        self.full = self.closed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_the_numbers_of_steps_epochs_and_results(tmp_path):
    writer, watch = Writer(), Notes()
    scalars = Scalars(writer, watch)
    work(tmp_path, scalars)
    scalars.on_result("finetune", {"top1": 91.5, "history": [], "seconds": 3.0}, fresh=True)
    names = [name for name, _, _ in writer.written]
    assert {"finetune/loss", "finetune/lr", "finetune/epoch_top1", "finetune/top1"} <= set(names)
    assert ("finetune/epoch_top1", 91.5, 4) in writer.written
    scalars.close()
    assert writer.closed
    writer.full = True
    scalars.on_epoch({"epoch": 2, "top1": 92.0})
    scalars.on_epoch({"epoch": 3, "top1": 93.0})
    assert watch.notes == ["no more for TensorBoard: No space left on device"]


@pytest.mark.parametrize("command", ["run", "calibrate", "train", "finetune"])
def test_without_the_package_nothing_begins(tmp_path, call, monkeypatch, command):
    monkeypatch.setattr(scalars_module, "find_spec", lambda name: None)
    arguments = {
        "run": tiny_run(tmp_path / "out"),
        "calibrate": ["calibrate", "none", "--weights", "none", "--data", "none", "--out", tmp_path / "out"],
    }.get(command, [command, tmp_path / "out"])
    told = ("--tensorboard: tensorboard is not installed (pip install 'updp[tensorboard]')",)
    call.refuses(*arguments, "--tensorboard", names=told)
    assert list(tmp_path.iterdir()) == []


def test_torchs_own_writer(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    with with_scalars(tmp_path, Watch()) as watch:
        work(tmp_path, watch)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"finetune/epoch_top1" in file.read_bytes()


def test_the_page_tells_how_far_an_unfinished_stage_is(tmp_path):
    run = write_run(tmp_path / "run", STAGES[:3])
    with logged(run, STAGES, Watch()) as log:
        work(run, log, steps=8)
    page = report(run).read_text(encoding="utf-8")
    assert "begun, epoch 1, 12% of finetune, best top-1 91.50 %" in page
    assert "not finished" in page
