"""Numbers as a reader wants them."""

from __future__ import annotations

import json

NOTHING = "–"
_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float | None) -> str:
    """A count with about four digits and a prefix: 519350000 is ``519.4 M``."""
    if value is None:
        return NOTHING
    factor, prefix = next(((f, p) for f, p in _PREFIXES if abs(value) >= f), (1.0, ""))
    scaled = value / factor
    digits = 0 if not prefix else 1 if abs(scaled) >= 100 else 2
    return f"{scaled:.{digits}f} {prefix}".strip()


def percent(value: float | None) -> str:
    """An accuracy: 97.777 is ``97.78 %``."""
    return NOTHING if value is None else f"{value:.2f} %"


def nats(value: float | None, *, unit: bool = False) -> str:
    """A divergence of answers: ``0.042``, with its unit ``0.042 nats``."""
    return NOTHING if value is None else f"{decimal(value)}{' nats' if unit else ''}"


def decimal(value: float | None) -> str:
    """A number with about three digits: ``5.6e-4``, ``0.0421``, ``4.88``, ``131``."""
    if value is None:
        return NOTHING
    if 0 < abs(value) < 1e-3:
        return scientific(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def whole(value: float | None) -> str:
    """A count in full: ``51,200``."""
    return NOTHING if value is None else f"{value:,.0f}"


def milliseconds(value: float | None) -> str:
    """A latency with three digits."""
    if value is None:
        return NOTHING
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f} ms"


def scientific(value: float | None) -> str:
    """An error relative to 1: ``3.1e-16``."""
    if value is None or value == 0:
        return NOTHING if value is None else "0"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def duration(seconds: float | None) -> str:
    """A time span: ``41.5 s``, ``3 min 02 s``, ``5 h 10 min``."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def plain(value: object) -> str:
    """Any JSON value as the text of a table cell."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def points(before: float, after: float) -> str:
    """The change of an accuracy: ``-0.42 points``."""
    return f"{_signed(after - before, 2)} points"


def relative(before: float, after: float) -> str:
    """The change of a count: ``-38 %``; empty if it was 0."""
    return f"{_signed(100 * (after / before - 1), 0)} %" if before else ""


def speedup(before: float, after: float) -> str:
    """How much faster: ``1.63x speed-up``; empty if a time is not above 0."""
    return f"{before / after:.2f}× speed-up" if before > 0 and after > 0 else ""


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    sign = "±" if float(text) == 0 else "−" if value < 0 else "+"
    return f"{sign}{text}"
