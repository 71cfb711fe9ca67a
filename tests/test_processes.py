"""Several processes: the same gradients, the same search, one message, and an end for all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import several
import shared_gradients
import torch
from accelerate import Accelerator
from commands import SPEC, Caller, options, tiny_run
from safetensors.torch import load_file
from test_data import PLAIN, Reader, opened
from timm.data import IterableImageDataset
from torch import Tensor
from torch.utils.data import TensorDataset

from updp import processes
from updp.cli import main
from updp.data import factory, loader
from updp.errors import InputError, ProcessError
from updp.oracle import Score, evaluate
from updp.pipeline import RunDirectory
from updp.pipeline.prepare import _check_training
from updp.pipeline.program import launched, program
from updp.pipeline.settings import resolve
from updp.search import SharedOracle
from updp.spec import load_spec
from updp.subnet import SubnetConfig
from updp.train import create_accelerator

LAUNCHED = "torchrun --nproc-per-node 2 -m updp"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Caller:
    return Caller(capsys)


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch):
    """Be one of several processes that a launcher started and that have not met."""

    def be(number: int, count: int) -> None:
        for name, value in (("RANK", number), ("WORLD_SIZE", count), ("LOCAL_RANK", number)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))

    return be


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its supernet, whose weights are random; it is continued in copies."""
    out = tmp_path_factory.mktemp("runs") / "untrained"
    changes = options(["baseline.epochs=0", "supernet.epochs=0", "finetune.epochs=1"])
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in tiny_run(out, *changes, "--until", "supernet")])
    assert not ended.value.code
    return out


def copy_of(directory: Path, name: str) -> Path:
    return Path(shutil.copytree(directory, directory.with_name(name)))


# --- gradients ---


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], tuple[dict[str, Tensor], ...]]:
    """Of every case: of one process, and of both of two."""
    folder = tmp_path_factory.mktemp("gradients")
    done = subprocess.run(
        [*several.LAUNCH, shared_gradients.__file__, str(folder)], capture_output=True, text=True, check=False,
        cwd=several.ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    accelerator: Accelerator = create_accelerator(cpu=True)
    return {
        case: (
            shared_gradients.gradients(*case, accelerator),
            *(load_file(folder / f"{'-'.join(case)}-{rank}.safetensors") for rank in range(2)),
        )
        for case in shared_gradients.CASES
    }


@pytest.mark.parametrize("case", [case for case in shared_gradients.CASES if case[-1] == "64"], ids="-".join)
def test_gradients_of_two_processes_are_those_of_one(gradients, case) -> None:
    """In float64 to 1e-12 of the gradient; in float32, no further from that than one process is, twice rounded."""
    exact, first, second = gradients[case]
    narrow = gradients[(*case[:2], "32")]
    names = [name for name in exact if name.startswith("grad")]
    assert len(names) >= 12
    for found in (first, second, *narrow):
        assert found.keys() == exact.keys()
    for one, other in ((first, second), narrow[1:]):
        assert all(torch.equal(one[name], other[name]) for name in exact)
    size = distance(exact, None, names)
    assert distance(first, exact, names) <= 1e-12 * size
    assert 0 < distance(narrow[1], exact, names) <= 2 * distance(narrow[0], exact, names) <= 1e-4 * size


@pytest.mark.parametrize("case", shared_gradients.CASES, ids="-".join)
def test_running_statistics_see_all_processes(gradients, case) -> None:
    one, first, _ = gradients[case]
    norms = [name for name in one if "running" in name]
    assert len(norms) >= 10
    tolerance = 1e-12 if case[-1] == "64" else 2e-5  # sums of thousands of float32 numbers, in another order
    for name in norms:
        torch.testing.assert_close(first[name], one[name], rtol=tolerance, atol=tolerance, msg=name)


def distance(found: dict[str, Tensor], exact: dict[str, Tensor] | None, names: list[str]) -> float:
    """The norm of a gradient, or of its difference to another, over all parameters."""
    squares = [(found[n].double() - (0 if exact is None else exact[n].double())).square().sum() for n in names]
    return float(torch.stack(squares).sum().sqrt())


# --- batches, scores and searches shared out ---


def test_batches_are_shared_out_whatever_the_number_of_processes() -> None:
    images = TensorDataset(torch.arange(50.0), torch.arange(50))
    whole = loader(images, 8, train=True, seed=3)
    for count in (2, 3, 8):
        parts = [loader(images, 8, train=True, seed=3, process=(number, count)) for number in range(count)]
        assert sum(part.weight for part in parts) == pytest.approx(count)
        for epoch in (0, 1):
            for each in (whole, *parts):
                each.set_epoch(epoch)
            shared = [torch.cat([labels for _, labels in batch]).tolist() for batch in zip(*parts, strict=True)]
            assert shared == [labels.tolist() for _, labels in whole]
    with pytest.raises(InputError, match="batch_size: 8 images cannot be shared out between 9 processes"):
        loader(images, 8, train=True, process=(0, 9))


def test_a_stream_is_read_in_parts_to_train_on_and_whole_by_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharing(Reader):
        """timm's readers find other processes by themselves."""

        dist_rank, dist_num_replicas = 1, 2

        def __iter__(self):
            self.order = self.order[self.dist_rank :: self.dist_num_replicas]
            return super().__iter__()

    monkeypatch.setattr(
        factory, "create_dataset",
        lambda name, *, is_training, seed, **_: IterableImageDataset("", reader=Sharing(shuffle=is_training, seed=0)),
    )  # fmt: skip
    monkeypatch.setattr(factory.Path, "exists", lambda _: True)
    data = opened("wds/set,classes=4@/data")
    assert len(list(data.val())) == 40
    images = data.train(PLAIN, seed=0, held_out=0.0)
    seen = []
    for number in range(2):
        batches = list(loader(images, 8, train=True, process=(number, 2)))
        assert [len(labels) for _, labels in batches] == [4] * 5
        seen.append({image.numpy().tobytes() for batch, _ in batches for image in batch})
    assert len(seen[0] | seen[1]) == 40
    with pytest.raises(InputError, match="got 7, allowed: a multiple of 2"):
        loader(images, 7, train=True, process=(0, 2))


def test_scores_of_shared_batches_have_the_bits_of_one_process() -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(6, 4)
    batches = [(torch.randn(7, 6), torch.randint(4, (7,))) for _ in range(5)]
    rows: list[object] = []
    evaluate(network, batches[3:], gather=lambda own: rows.extend(own) or [own])
    shared = evaluate(network, batches[:3], gather=lambda own: [own, json.loads(json.dumps(rows))])
    assert shared == evaluate(network, batches)


def test_candidates_are_shared_out_in_the_order_of_prefixes(monkeypatch: pytest.MonkeyPatch, as_process) -> None:
    blocks = ["a", "b", "c"]
    configs = [SubnetConfig(SPEC, dict.fromkeys(chosen, "full")) for chosen in ("c", "ab", "a", "b", "bc")]
    asked: list[list[str]] = []
    second: list[object] = []

    class Counting:
        def score(self, some):
            asked.append(["".join(config.choices) for config in some])
            return [Score(len(config.choices), 50, 0.1 + 0.2, 3) for config in some]

    def gathered(own: list[object]) -> list[object]:
        if processes.is_first():
            return [own, second]
        second.extend(own)
        raise InterruptedError

    monkeypatch.setattr(processes, "gathered", gathered)
    as_process(1, 2)
    with pytest.raises(InterruptedError):
        SharedOracle(Counting(), blocks).score(configs)
    as_process(0, 2)
    scores = SharedOracle(Counting(), blocks).score(configs)
    assert asked == [["bc", "b", "c"], ["ab", "a"]]
    assert [score.top1 for score in scores] == [1, 2, 1, 1, 2]


def test_two_processes_search_as_one_and_do_all_stages(untrained: Path, call: Caller) -> None:
    one, two = copy_of(untrained, "one"), copy_of(untrained, "two")
    assert call("search", one).status == 0
    done = several.commands(["search", two], ["finetune", two], ["merge", two])
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("scores.jsonl", "subnet.json"):
        assert (two / "search" / name).read_bytes() == (one / "search" / name).read_bytes(), name
    assert len((one / "search" / "scores.jsonl").read_text().splitlines()) == 8
    assert done.stdout.count("search: started") == done.stdout.count("merge: started") == 1  # one process speaks
    results = [json.loads((two / stage / "result.json").read_text()) for stage in RunDirectory.open(two).record.stages]
    assert [result["processes"] for result in results] == [1, 1, 2, 2, 2]
    assert results[-1]["certificate"]["ok"]
    assert not list(two.rglob("*.tmp"))


# --- how all end ---


@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        ("full disk", 2, "error: disk: No space left on device"),
        pytest.param("no number", 1, "error: loss is nan", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_one_process_ends_all_with_one_message(untrained: Path, tmp_path: Path, kind, status, told) -> None:
    run = trainable(untrained, tmp_path)
    ended = several.fault(kind, run)
    assert [each.returncode for each in ended] == [status, status], ended
    said = "".join(each.stderr for each in ended)
    assert told in said
    assert said.count("error: ") == 1
    assert "Traceback" not in said


def test_a_dead_process_ends_the_others_and_says_how_to_go_on(untrained: Path, tmp_path: Path) -> None:
    run = trainable(untrained, tmp_path)
    ended = several.fault("dead", run)
    assert [each.returncode for each in ended] == [1, -9], ended
    said = ended[0].stderr
    assert said.startswith("error: a process of this run died or does not answer any more (")
    again = f"Finished stages are kept. The same command goes on from there:\n  {LAUNCHED} train {run}"
    assert again in said
    assert "Traceback" not in said
    assert not (run / "supernet" / "result.json").exists()


def trainable(untrained: Path, folder: Path) -> Path:
    """A run whose next stage trains."""
    run = Path(shutil.copytree(untrained, folder / "run"))
    record = json.loads((run / "run.json").read_text())
    record["settings"] = [setting for setting in record["settings"] if setting != "supernet.epochs=0"]
    (run / "run.json").write_text(json.dumps(record))
    (run / "supernet" / "result.json").unlink()
    return run


def test_what_torch_says_of_lost_processes_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, as_process) -> None:
    as_process(1, 2)
    monkeypatch.setattr(processes, "_join", lambda: None)
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection closed by peer [::1]:1. This is so."
    with pytest.raises(ProcessError, match=r"died .*\(Connection closed by peer \[::1\]:1\)$"), processes.together():
        raise RuntimeError(lost)
    with pytest.raises(RuntimeError, match="mat1"), processes.together():
        raise RuntimeError("mat1 and mat2 cannot be multiplied")


# --- what a run says of its processes ---


def test_a_run_may_go_on_with_another_number_of_processes(untrained: Path, tmp_path: Path, call: Caller) -> None:
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    assert record["processes"] == 1
    (run / "run.json").write_text(json.dumps({**record, "processes": 4}))
    changes = options(["baseline.epochs=0", "supernet.epochs=0", "finetune.epochs=1"])
    done = call(*tiny_run(run, *changes, "--until", "supernet"))
    assert done.status == 0, done
    assert "the run began with 4 processes and goes on with 1: as good, but not bit for bit" in done.out
    del record["processes"]
    (run / "run.json").write_text(json.dumps(record))
    assert RunDirectory.open(run).record.processes == 1


def test_batches_too_small_for_the_processes_are_bad_input(tmp_path: Path, call: Caller, as_process) -> None:
    as_process(0, 9)
    with processes.alone():
        assert (processes.count(), processes.number()) == (1, 0)
    assert (processes.count(), processes.share_of(20)) == (9, slice(0, 2))
    with pytest.raises(InputError, match=r"finetune\.batch_size: got 8, allowed: an image for each of 9 processes"):
        _check_training(resolve(load_spec(SPEC), ["finetune.batch_size=8"]))


def test_the_command_that_goes_on_is_the_launchers(as_process) -> None:
    as_process(0, 4)
    assert launched() == "torchrun --nproc-per-node 4 -m updp"
    as_process(0, 1)
    assert launched() == program()


def test_more_processes_than_gpus_is_bad_input(monkeypatch: pytest.MonkeyPatch, as_process) -> None:
    as_process(2, 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="process 3 of this host finds 2 GPUs; allowed: 2 processes on this host"):
        processes.check_device("cuda")
    processes.check_device("cpu")


# --- long ones ---


@pytest.mark.slow
def test_a_calibration_in_two_processes(tmp_path: Path, untrained: Path) -> None:
    weights = untrained / "baseline" / "weights.safetensors"
    out = tmp_path / "calibrated"
    done = several.commands(
        ["calibrate", SPEC, "--weights", weights, "--data", "digits", "--prune", 2, "--images", 40, "--out", out,
         "--candidates", 2, "--set", "distill.epochs=1"]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "calibrate" / "result.json").read_text())
    assert found["processes"] == 2
    assert len(found["distilled"]["history"]) == 1
    assert json.loads((out / "merge" / "result.json").read_text())["certificate"]["ok"]


@pytest.mark.slow
def test_the_demo_in_two_processes_is_as_good(tmp_path: Path, call: Caller) -> None:
    """A shorter demo: what is learned in two processes is what is learned in one, apart from noise."""
    short = options(["baseline.epochs=6", "supernet.epochs=2", "finetune.epochs=8", "search.generations=2"])
    tops = []
    for number, out in enumerate((tmp_path / "one", tmp_path / "two")):
        line = ["run", SPEC, "--data", "digits", "--prune", 4, "--threads", 1, "--out", out, *short]
        done = several.commands(line) if number else call(*line)
        assert not (done.returncode if number else done.status), done
        stages = [json.loads((out / stage / "result.json").read_text()) for stage in ("baseline", "merge")]
        tops.append([stage["top1"] for stage in stages])
    assert min(min(pair) for pair in tops) > 90, tops
    assert all(abs(a - b) <= 3 for a, b in zip(*tops, strict=True)), tops  # 360 images: 3 points are 11


@pytest.mark.slow
def test_torchrun_ends_within_a_minute_when_a_process_is_killed(tmp_path: Path) -> None:
    changes = options(["held_out=0.8", "baseline.epochs=200"])
    line = ["run", SPEC, "--data", "digits", "--prune", 4, "--threads", 1, "--out", tmp_path / "run", *changes]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "updp", *map(str, line)]
    said, told = tmp_path / "out", tmp_path / "err"
    with said.open("w") as out, told.open("w") as err:
        launcher = subprocess.Popen(words, cwd=several.ROOT, stdout=out, stderr=err)
    try:
        while "  epoch" not in said.read_text():
            assert launcher.poll() is None, told.read_text()
            time.sleep(0.2)
        os.kill(_rank(launcher.pid, 1), signal.SIGKILL)
        launcher.wait(60)
    finally:
        launcher.kill()
    assert launcher.returncode == 1
    text = told.read_text()
    assert text.count("The same command goes on from there") == 1, text
    assert "died or does not answer" in text or "perhaps since another process of the run ended" in text
    assert f"torchrun --nproc-per-node 2 -m updp run {SPEC}" in text


def _rank(launcher: int, number: int) -> int:
    """The process of a launcher that has this rank."""
    children = (int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split())
    wanted = f"RANK={number}".encode()
    return next(pid for pid in children if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
