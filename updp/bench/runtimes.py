"""The runtimes that networks are timed in, each used as its own users would.

All of them compute in one process, in turns: what slows the machine slows all of them. Their pools of threads stay out
of each other's way as long as only one of them is awake; some spin for a while after their work, so `rest` waits until
nothing computes before the next one's turn, and each turn begins with calls that are not timed, which wake its threads
and bring its weights back: in such turns every runtime is as fast as alone. Another process that computes is a
different matter: OpenMP's threads wait for each other, and one that has no CPU costs torch tens of times its work. What
is timed begins with an input as the runtime wants it (channels last for torch, an array for others) and ends with its
logits.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from updp.deployment import deploy
from updp.errors import InputError
from updp.exporting import TOLERANCE, export_network, quiet
from updp.measure import package_version

INSTALL = "pip install 'updp[bench]'"
_CONVERTING = 600.0  # seconds that a converter may take
_AWAKE = 0.2  # CPUs in use from which on something still computes
_LONGEST_REST, _LOOK = 0.5, 0.002  # seconds

Run: TypeAlias = Callable[[], Any]


class Subject:
    """A network in eval mode, and the files that runtimes read it from, made on first use.

    Args:
        input: (channels, height, width) of an image.
    """

    def __init__(self, module: nn.Module, input: tuple[int, int, int]) -> None:
        self.module, self.input = module.eval(), input
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="updp-bench-"))
        return self._folder

    @cached_property
    def onnx(self) -> Path:
        """The network as ONNX, its batch size free."""
        return export_network(self.module, self.input, self.folder / "network.onnx", "onnx").path

    def close(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class Runtime(ABC):
    """A way to run a network.

    Attributes:
        name: on the command line.
        title: for people.
        packages: that must be importable, beside torch.
        precision: what it computes in; what is not float32 is listed apart.
        in_torch: whether torch's own memory is all that it takes, so that it can be counted.
        tolerance: the largest difference from torch, relative to the largest logit, that is still the same network.
    """

    name: str
    title: str
    packages: tuple[str, ...] = ()
    precision = "float32"
    in_torch = False
    tolerance = TOLERANCE

    def missing(self) -> str | None:
        """What is not installed, or None."""
        absent = [package for package in self.packages if find_spec(package) is None]
        return ", ".join(absent) or None

    def versions(self) -> dict[str, str]:
        """Of its packages."""
        return {package: package_version(package) for package in self.packages or ("torch",)}

    @abstractmethod
    def prepare(self, subject: Subject, x: Tensor, threads: int) -> Run:
        """Make a network ready for a batch; torch has that number of threads already. Calling the result runs it."""

    def logits(self, result: Any) -> Tensor:
        """What a run gave, as a tensor."""
        out: Tensor = result
        return out


class Eager(Runtime):
    """torch, operator by operator, channels last."""

    name, title, in_torch = "torch", "torch eager", True

    def prepare(self, subject: Subject, x: Tensor, threads: int) -> Run:
        model, images = _channels_last(subject.module, x)
        return partial(model, images)


class DeployedHere(Runtime):
    """`updp.deploy`: the forms measured on this machine, or taken from the cache of plans."""

    name, title, in_torch = "deployed", "updp deployed", True

    def prepare(self, subject: Subject, x: Tensor, threads: int) -> Run:
        model, images = _channels_last(subject.module, x)
        return partial(deploy(model, images), images)


class Compiled(Runtime):
    """`torch.compile` with frozen weights, channels last."""

    name, title = "compile", "torch.compile"

    def prepare(self, subject: Subject, x: Tensor, threads: int) -> Run:
        from torch._inductor import config

        model, images = _channels_last(subject.module, x)
        logging.getLogger("torch.utils.cpp_extension").setLevel(
            logging.ERROR
        )  # it misses CUDA on every machine without
        with quiet(), config.patch(freezing=True, compile_threads=1), torch.inference_mode():
            compiled = torch.compile(model)
            compiled(images)
        return lambda: compiled(images)


class OnnxRuntime(Runtime):
    """ONNX Runtime, all graph optimizations, the batch size fixed."""

    name, title, packages = "onnxruntime", "ONNX Runtime", ("onnxruntime", "onnx", "onnxscript")

    def prepare(self, subject: Subject, x: Tensor, threads: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", len(x))
        session = onnxruntime.InferenceSession(str(subject.onnx), options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: x.numpy()}
        return lambda: session.run(None, inputs)

    def logits(self, result: Any) -> Tensor:
        return torch.from_numpy(result[0])


class OpenVino(Runtime):
    """OpenVINO for latency, the batch size fixed, in a precision that is said rather than chosen by the machine."""

    name, title, packages = "openvino", "OpenVINO", ("openvino", "onnx", "onnxscript")
    hint = "f32"

    def prepare(self, subject: Subject, x: Tensor, threads: int) -> Run:
        import openvino

        core = openvino.Core()
        model = core.read_model(str(subject.onnx))
        model.reshape({0: list(x.shape)})
        options = {
            "INFERENCE_PRECISION_HINT": self.hint, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
        }  # fmt: skip
        request = core.compile_model(model, "CPU", options).create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))

        def run() -> Any:
            request.infer()
            return request.get_output_tensor().data

        return run

    def logits(self, result: Any) -> Tensor:
        return torch.from_numpy(result.copy())


class OpenVinoBf16(OpenVino):
    """OpenVINO in bfloat16."""

    name, title, hint, precision = "openvino-bf16", "OpenVINO bf16", "bf16", "bfloat16"
    tolerance = 0.3


class Ncnn(Runtime):
    """ncnn by way of pnnx, in float32; it takes one image at a time, so the images of a batch run one by one."""

    name, title, packages = "ncnn", "ncnn", ("ncnn", "pnnx")

    def prepare(self, subject: Subject, x: Tensor, threads: int) -> Run:
        import ncnn
        import numpy as np

        files = _pnnx(subject)
        network = ncnn.Net()
        network.opt.num_threads, network.opt.use_vulkan_compute = threads, False
        for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(network.opt, option, False)
        if network.load_param(str(files[0])) or network.load_model(str(files[1])):
            raise InputError("ncnn has not all operators of this network")
        inputs, outputs = network.input_names(), network.output_names()
        images = [ncnn.Mat(image.numpy()).clone() for image in x]

        def run() -> list[Any]:
            results = []
            for image in images:
                extractor = network.create_extractor()
                extractor.input(inputs[0], image)
                results.append(np.array(extractor.extract(outputs[0])[1]))
            return results

        return run

    def logits(self, result: Any) -> Tensor:
        return torch.stack([torch.from_numpy(each) for each in result])


RUNTIMES: Mapping[str, Runtime] = {
    each.name: each for each in (Eager(), DeployedHere(), Compiled(), OnnxRuntime(), OpenVino(), OpenVinoBf16(), Ncnn())
}
"""By name, in the order in which they are shown."""


def rest(limit: float = _LONGEST_REST) -> None:
    """Wait until no thread of this process computes: pools of threads spin for a while after their work."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        used, start = time.process_time(), time.perf_counter()
        time.sleep(_LOOK)
        if time.process_time() - used < _AWAKE * (time.perf_counter() - start):
            return


@contextmanager
def settled(threads: int) -> Iterator[None]:
    """Inside, torch has so many threads, and compiles networks that it compiled before anew; both are put back.

    A runtime may bind threads to CPUs: what it does to the one that calls it is undone, too.
    """
    before = torch.get_num_threads()
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if cpus is not None:
            os.sched_setaffinity(0, cpus)
        torch._dynamo.reset()


def _channels_last(module: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Copies; the network's own layout stays."""
    model = copy.deepcopy(module).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return model, x.contiguous(memory_format=torch.channels_last)


def _pnnx(subject: Subject) -> tuple[Path, Path]:
    """The network in ncnn's format: parameters and weights."""
    import pnnx

    files = subject.folder / "network.ncnn.param", subject.folder / "network.ncnn.bin"
    if not files[1].exists():
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(subject.module, torch.randn(1, *subject.input), check_trace=False)
        traced.save(str(subject.folder / "network.pt"))
        shape = ",".join(map(str, (1, *subject.input)))
        command = [pnnx.EXEC_PATH, "network.pt", f"inputshape=[{shape}]", "fp16=0"]
        done = subprocess.run(command, cwd=subject.folder, capture_output=True, text=True, timeout=_CONVERTING)
        if done.returncode or not files[1].exists():
            raise InputError(f"pnnx does not convert it: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return files
