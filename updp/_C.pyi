from collections.abc import Sequence
from typing import TypeAlias

_Array: TypeAlias = tuple[int, Sequence[int], Sequence[int]]

def rows() -> list[tuple[str, str, str, str, str, bool]]: ...
def cpu_features() -> dict[str, bool]: ...
def dwcompose(
    variant: str,
    outer: _Array,
    inner: _Array,
    out: _Array,
    inner_stride: Sequence[int],
    inner_dilation: Sequence[int],
    outer_dilation: Sequence[int],
    threads: int,
) -> None: ...
