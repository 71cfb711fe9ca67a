"""What is constant about a convolution with its epilogue, as one text: for a schema, an export and a file."""

from __future__ import annotations

import re
from dataclasses import dataclass

ACTIVATIONS = ("none", "relu", "relu6", "gelu", "silu", "hardswish")  # in the order of csrc/conv.h

_TEXT = re.compile(
    r"(?P<variant>\w+) weight=(?P<weight>\d+x\d+(?:x\d+x\d+)?)(?: groups=(?P<groups>\d+))? stride=(?P<stride>\d+x\d+)"
    r" padding=(?P<padding>\d+,\d+,\d+,\d+) activation=(?P<activation>\w+) residual=(?P<residual>first|last)"
)


@dataclass(frozen=True)
class ConvForm:
    """A convolution, or a linear layer where ``weight`` has two sizes; ``str()`` is the text, ``parse`` reads it.

    Args:
        variant: a row of ``csrc/kernels.def``, for which the weight is packed, or ``"reference"``.
        weight: ``(K, C / groups, kh, kw)`` or ``(K, C)``.
        stride: vertical, horizontal.
        padding: zeros above, left, below and right.
        activation: one of ``ACTIVATIONS``; ``gelu`` is the exact one.
        residual_first: a residual is added before the activation, not at the end.
        groups: 1, or K of a depthwise convolution; the reference takes any.
    """

    variant: str
    weight: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    activation: str = "none"
    residual_first: bool = False
    groups: int = 1

    def __post_init__(self) -> None:
        for name, sizes, lengths in (("weight", self.weight, (2, 4)), ("stride", self.stride, (2,))):
            if len(sizes) not in lengths or any(size < 1 for size in sizes):
                allowed = " or ".join(map(str, lengths))
                raise ValueError(f"conv: got {name} {tuple(sizes)}, allowed: {allowed} numbers from 1")
        if len(self.padding) != 4 or any(size < 0 for size in self.padding):
            raise ValueError(
                f"conv: got padding {tuple(self.padding)}, allowed: 4 numbers from 0 (top, left, bottom, right)"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"conv: got activation {self.activation!r}, allowed: {', '.join(ACTIVATIONS)}")
        if self.is_linear and (any(size != 1 for size in self.stride) or any(self.padding)):
            raise ValueError("conv: a linear layer has neither stride nor padding")
        if self.groups < 1 or self.weight[0] % self.groups != 0 or (self.is_linear and self.groups != 1):
            raise ValueError(
                f"conv: got {self.groups} groups for the weight {tuple(self.weight)}, allowed: 1, or what"
                " divides the output channels of a convolution"
            )

    @property
    def is_linear(self) -> bool:
        return len(self.weight) == 2

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.weight[1] * self.groups

    def __str__(self) -> str:
        weight, stride = ("x".join(map(str, sizes)) for sizes in (self.weight, self.stride))
        groups = f" groups={self.groups}" if self.groups != 1 else ""
        padding, residual = ",".join(map(str, self.padding)), "first" if self.residual_first else "last"
        return (
            f"{self.variant} weight={weight}{groups} stride={stride} padding={padding}"
            f" activation={self.activation} residual={residual}"
        )

    @classmethod
    def parse(cls, text: str) -> ConvForm:
        """Read what ``str()`` gave.

        Raises:
            ValueError: the text is no form.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(f"conv: got form {text!r}, need the text of a ConvForm")
        sizes = {name: tuple(map(int, re.split("[x,]", found[name]))) for name in ("weight", "stride", "padding")}
        return cls(
            found["variant"],
            **sizes,
            activation=found["activation"],
            residual_first=found["residual"] == "first",
            groups=int(found["groups"] or 1),
        )
