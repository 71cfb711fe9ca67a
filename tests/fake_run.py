"""A run directory as the pipeline writes it, made up from formulas in a moment: no training, no torch."""

import json
import math
from pathlib import Path
from typing import Any

from updp.spec import load_spec
from updp.subnet import SubnetConfig

STAGES = ("baseline", "supernet", "search", "finetune", "merge")
SPEC = "convnext_digits"
BLOCKS = [f"stages.{stage}.blocks.{block}" for stage, depth in enumerate((2, 2, 4, 2)) for block in range(depth)]
PRUNED = [BLOCKS[1], BLOCKS[3], BLOCKS[4], BLOCKS[6], BLOCKS[8]]
CHOICES = {block: "full" if block == BLOCKS[3] else "pointwise" for block in PRUNED}


def write_run(directory: Path, stages: tuple[str, ...] = STAGES) -> Path:
    """Write run.json, spec.yaml and the results of ``stages``."""
    spec = load_spec(SPEC)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spec.yaml").write_text(spec.text, encoding="utf-8")
    write_json(directory / "run.json", about(spec.hash))
    for stage in stages:
        (directory / stage).mkdir(exist_ok=True)
        if stage == "search":
            SubnetConfig(SPEC, CHOICES).save(directory / "search" / "subnet.json")
        write_json(directory / stage / "result.json", RESULTS[stage]())
    return directory


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def change(path: Path, **values: Any) -> None:
    """Overwrite keys of a JSON file."""
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})


def about(spec_hash: str) -> dict[str, Any]:
    return {
        "version": 1,
        "spec": SPEC,
        "spec_hash": spec_hash,
        "data": "digits",
        "num_classes": 10,
        "device": "cpu",
        "precision": "no",
        "weights": None,
        "subnet": None,
        "prune": len(PRUNED),
        "recipe": None,
        "settings": ["finetune.epochs=40", "blend.K=3.5"],
        "seed": 0,
        "threads": 2,
        "environment": environment(),
        "blocks": [{"name": name, "structure": "block", "recipes": ["pointwise", "full"]} for name in BLOCKS],
    }


def environment() -> dict[str, Any]:
    return {
        "device": "cpu",
        "cpu": "Fictional Processor 9000 @ 2.60GHz",
        "threads": 2,
        "dtype": "float32",
        "updp": "0.1.0",
        "python": "3.11.9",
        "torch": "2.14.1",
        "timm": "1.0.31",
    }


def _wobble(step: int) -> float:
    return math.sin(12.9898 * (step + 1))


def baseline() -> dict[str, Any]:
    history = [
        {
            "epoch": epoch,
            "train_loss": 2.25 * math.exp(-epoch / 4) + 0.03 + 0.02 * abs(_wobble(epoch)),
            "top1": 98.61 - 85 * math.exp(-epoch / 3) + 0.3 * _wobble(epoch),
            "lr": 1e-3,
            "seconds": 2.5,
        }
        for epoch in range(1, 21)
    ]
    return {"top1": 98.6111, "top5": 100.0, "loss": 0.061, "epochs": 20, "seconds": 51.3, "history": history}


def supernet() -> dict[str, Any]:
    history = [
        {
            "epoch": epoch,
            "loss_keep": 0.06 + 0.05 * math.exp(-epoch),
            "loss_random": 0.19 + 0.9 * math.exp(-epoch / 2),
            "loss_pruned": 0.31 + 1.7 * math.exp(-epoch / 2),
            "seconds": 6.1,
        }
        for epoch in range(1, 11)
    ]
    return {"top1_keep": 98.3333, "top1_pruned": 91.9444, "epochs": 10, "seconds": 61.0, "history": history}


def search() -> dict[str, Any]:
    history = [
        {
            "generation": generation,
            "best": 97.4 - 3.1 * math.exp(-generation / 2),
            "mean": 95.9 - 6.5 * math.exp(-generation / 3) + 0.2 * _wobble(generation),
            "evaluations": 32 * (generation + 1),
        }
        for generation in range(10)
    ]
    return {
        "best": {"top1": 97.3958, "loss": 0.112},
        "candidates_scored": 173,
        "unshared_because": None,
        "exhaustive": False,
        "block_evaluations": {"shared": 1104, "unshared": 1730},
        "seconds": 38.2,
        "history": history,
    }


def finetune() -> dict[str, Any]:
    history = [
        {
            "epoch": epoch,
            "train_loss": 0.05 + 0.25 * math.exp(-(((epoch - 12) / 7) ** 2)) + 0.01 * abs(_wobble(epoch)),
            "top1": 98.4 - 2.5 * math.exp(-(((epoch - 13) / 6) ** 2)) + 0.15 * _wobble(epoch),
            "lr": 1e-3,
            "blend": min(1.0, math.sin(min(1.0, epoch / 27) * math.pi / 2)),
            "seconds": 3.0,
        }
        for epoch in range(1, 41)
    ]
    return {"top1": 98.3333, "loss": 0.07, "epochs": 40, "seconds": 3723.0, "history": history}


def timing(name: str, median: float) -> dict[str, Any]:
    return {"name": name, "median_ms": median, "low_ms": 0.95 * median, "high_ms": 1.09 * median, "runs": 60}


def certificate() -> dict[str, Any]:
    ops = [
        {
            "block": block,
            "op": "merged.0",
            "steps": ["conv_dw", "norm", "mlp.fc1", "mlp.fc2"] if choice == "full" else ["mlp.fc1", "mlp.fc2"],
            "error": (index + 1.3) * 1.1e-16,
            "ring": (index + 2.1) * 1.2e-16,
            "interior": (index + 1.1) * 1.1e-16,
            "bound": 1e-9,
            "ok": True,
        }
        for index, (block, choice) in enumerate(CHOICES.items())
    ]
    blocks = {block: (index + 1.7) * 1e-16 for index, block in enumerate(CHOICES)}
    worst = max(op["ring"] for op in ops)
    return {"ok": True, "ops": ops, "worst": worst, "blocks": blocks, "logits": 4.44e-16, "float32": 3.1e-7}


def merge() -> dict[str, Any]:
    depths = {block: 1 if CHOICES.get(block) == "full" else 2 if block in CHOICES else 3 for block in BLOCKS}
    block_latency = [
        {
            "block": block,
            "choice": CHOICES.get(block, "keep"),
            "before": timing("before", 1.4 / (1 + index / 4)),
            "after": timing("after", (0.55 if block in CHOICES else 1.0) * 1.4 / (1 + index / 4)),
        }
        for index, block in enumerate(BLOCKS)
    ]
    return {
        "top1_unmerged": 98.3333,
        "top1": 98.3333,
        "seconds": 9.4,
        "certificate": certificate(),
        "certificate_random": {**certificate(), "logits": 6.66e-16, "float32": 4.2e-7},
        "before": {
            "macs": 8_134_656,
            "params": 551_234,
            "depth": 35,
            "blocks": [{"name": b, "depth": 3} for b in BLOCKS],
        },
        "after": {
            "macs": 5_012_480,
            "params": 331_870,
            "depth": 29,
            "blocks": [{"name": block, "depth": depth} for block, depth in depths.items()],
        },
        "latency": {"environment": environment(), "rows": [timing("baseline", 8.412), timing("merged", 5.207)]},
        "block_latency": block_latency,
        "training": {
            "batch_size": 64,
            "precision": "no",
            "rows": [
                {**timing(name, median), "memory": memory}
                for name, median, memory in (
                    ("baseline", 81.2, 61_200_000),
                    ("supernet", 262.4, 83_100_000),
                    ("blend below 1", 130.7, 97_400_000),
                    ("blend 1", 63.9, 55_800_000),
                    ("merged", 52.1, 41_300_000),
                )
            ],
        },
    }


RESULTS = {"baseline": baseline, "supernet": supernet, "search": search, "finetune": finetune, "merge": merge}
