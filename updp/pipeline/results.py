"""What the commands read of a stage's ``result.json``; whoever shows a result can rely on this."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from updp.errors import InputError, Place, Problem

_NUMBER = (int, float)
_MAYBE = (int, float, type(None))  # null: no number in JSON, as infinity; or not told, as accuracy without labels
_COST = {"depth": _NUMBER, "macs": _NUMBER, "params": _NUMBER}
_TIMES = {"median_ms": _NUMBER, "low_ms": _NUMBER, "high_ms": _NUMBER}
_TRAINED = {"top1": _NUMBER, "epochs": _NUMBER}

_FORMS: dict[str, dict[str, Any]] = {
    "baseline": {"top1": _MAYBE, "epochs": _NUMBER},
    "supernet": {"top1_keep": _NUMBER, "top1_pruned": _NUMBER},
    "search": {
        "best": {"top1": _NUMBER},
        "candidates_scored": _NUMBER,
        "block_evaluations": {"shared": _NUMBER, "unshared": _NUMBER},
    },
    "damage": {"rows": list},
    "calibrate": {"damage": _NUMBER, "choices": dict, "solved": list},
    "finetune": _TRAINED,
    "merge": {
        "top1_unmerged": _MAYBE,
        "top1": _MAYBE,
        "certificate": {"ok": bool, "ops": list, "worst": _MAYBE, "logits": _MAYBE, "float32": _MAYBE},
        "before": _COST,
        "after": _COST,
        "latency": {"rows": list, "environment": dict.fromkeys(("cpu", "device", "threads", "torch"), object)},
    },
}


def check_result(stage: str, result: Mapping[str, Any], file: Path) -> None:
    """Check that a result has what is read of it.

    Raises:
        InputError: with all that is missing or of another type.
    """
    wrong = list(_wrong(result, _FORMS[stage], ""))
    if stage == "merge" and not wrong:
        rows = {row["name"]: row for row in result["latency"]["rows"] if isinstance(row, dict) and "name" in row}
        for name in ("baseline", "merged"):
            wrong += _wrong(rows.get(name), _TIMES, f"latency.rows[{name}]")
    if wrong:
        message = "is missing or not what updp writes; remove the file to do the stage again"
        raise InputError([Problem(Place(str(file)), where, message) for where in wrong])


def _wrong(value: Any, form: Any, where: str) -> Iterator[str]:
    """The parts of a value that do not have the form: a type or types, or forms by key."""
    if not isinstance(form, dict):
        if not isinstance(value, form) or (isinstance(value, bool) and form in (_NUMBER, _MAYBE)):
            yield where
    elif not isinstance(value, dict):
        yield where
    else:
        for key, inner in form.items():
            name = f"{where}.{key}" if where else key
            if key in value:
                yield from _wrong(value[key], inner, name)
            else:
                yield name
