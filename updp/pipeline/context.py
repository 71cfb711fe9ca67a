"""What every stage works with: the run directory, the data, the device, and who watches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from updp import processes
from updp.artefact import load_state, load_tensors, save_tensors
from updp.data import Data, ImageSet, data_config, loader, open_data
from updp.errors import InputError
from updp.oracle import Score, evaluate
from updp.pipeline.directory import RunDirectory
from updp.pipeline.watch import Watch
from updp.spec import ArchSpec, TrainSettings
from updp.structure import create_model
from updp.subnet import SubnetConfig
from updp.supernet import Supernet, build_supernet
from updp.train import USUAL, Checkpoints, Every, FitResult, Policy, create_accelerator, fit
from updp.train.session import derive_seed

_LARGEST_BATCH = 128  # for scoring
_BATCH_PIXELS = 1 << 20  # larger batches gain nothing on a CPU but page faults
_WORKERS = 8  # processes that read images, at most; small sets are kept in memory instead
_IN_MEMORY = 64  # pixels a side up to which images are read by the training process itself


@dataclass
class Context:
    """A run under way.

    Attributes:
        judged: the data that has labels to judge by; None where there are none.
        every: how often the state of a training is kept.
    """

    run: RunDirectory
    data: Data
    judged: Data | None
    accelerator: Accelerator
    watch: Watch
    every: Every = USUAL

    @classmethod
    def of(cls, run: RunDirectory, watch: Watch, every: Every = USUAL) -> Context:
        """Open what a run directory names.

        Raises:
            InputError: the data or the device is not there any more.
        """
        accelerator = start(run.record.device, run.record.precision, run.record.threads)
        data, judged = _open(run)
        if judged is not None:
            judged.check_classes(run.record.num_classes)
        return cls(run, data, judged, accelerator, watch if accelerator.is_main_process else Watch(), every)

    @property
    def spec(self) -> ArchSpec:
        return self.run.spec

    @property
    def seed(self) -> int:
        return self.run.record.seed

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return bool(self.accelerator.is_main_process)

    # --- networks ---

    def new_model(self) -> nn.Module:
        return create_model(self.spec, num_classes=self.run.record.num_classes, seed=self.seed)

    def baseline_model(self) -> nn.Module:
        """The network with the weights of the stage ``baseline``."""
        model = self.new_model()
        file = self.run.file("baseline", "weights.safetensors")
        load_state(model, load_tensors(file)[0], file)
        return model

    def supernet(self, *, resized: bool = False) -> Supernet:
        """A supernet that starts from the baseline's weights."""
        torch.manual_seed(derive_seed(self.seed, "supernet"))  # for the parameters that recipes add
        return build_supernet(self.spec, self.baseline_model(), resized=resized)

    def trained_supernet(self) -> Supernet:
        """The supernet of the stage ``supernet``."""
        supernet = self.supernet()
        self.load(supernet, "supernet")
        return supernet

    def pruned_network(self) -> Supernet:
        """The pruned network of the last stage before ``merge``, not yet merged."""
        supernet = self.supernet(resized=True)
        supernet.reduce(self.subnet())
        supernet.free_baseline()
        self.load(supernet, self.run.record.stages[-2])
        return supernet.eval()

    def calibrated_supernet(self) -> Supernet:
        """The baseline beside the pruned network of the stage ``calibrate``, reduced to its subnet."""
        supernet = self.supernet(resized=True)
        supernet.reduce(self.subnet())
        file = self.run.file("calibrate", "weights.safetensors")
        kept = {name: tensor for name, tensor in supernet.state_dict().items() if ".keep." in name}
        load_state(supernet, {**kept, **load_tensors(file)[0]}, file)
        return supernet

    def subnet(self) -> SubnetConfig:
        """The subnet that was given, found by the search, or chosen by its damage."""
        stage = "search" if self.run.record.calibration is None else "calibrate"
        return SubnetConfig.load(self.run.file(stage, "subnet.json"))

    def load(self, module: nn.Module, stage: str) -> None:
        file = self.run.file(stage, "weights.safetensors")
        load_state(module, load_tensors(file)[0], file)

    def save(self, module: nn.Module, stage: str) -> None:
        if self.is_main:
            save_tensors(self.run.file(stage, "weights.safetensors"), module.state_dict())

    # --- work ---

    def fit(
        self, stage: str, network: nn.Module, policy: Policy, evaluate: Evaluate | None = None,
        images: ImageSet | None = None,
    ) -> FitResult:  # fmt: skip
        """Train a network in place, as the stage's schedule says; on the training images, if no others are given.

        Stopped, it goes on from the state that was kept last.
        """
        settings: TrainSettings = getattr(self.spec.schedule, stage)
        seed = derive_seed(self.seed, stage)
        chosen = images or self.data.train(settings, seed=self.seed, held_out=self.spec.schedule.held_out)
        batches = loader(
            chosen, settings.batch_size, train=True, seed=seed, workers=workers_for(self.spec),
            process=(processes.number(), processes.count()),
        )  # fmt: skip
        return fit(
            network, batches, settings, policy, accelerator=self.accelerator, seed=seed, evaluate=evaluate,
            progress=self.watch,
            checkpoints=Checkpoints(self.run.checkpoints(stage), self.every, self.watch.on_note),
        )  # fmt: skip

    def score(self, network: nn.Module, title: str) -> Score:
        """Accuracy on the validation images, which must have labels."""
        assert self.judged is not None
        return score(network.to(self.accelerator.device), self.judged, self.watch, title, self.spec)

    def told(self, network: nn.Module) -> dict[str, float | None]:
        """What a result says of a network's accuracy: nothing where there are no labels."""
        if self.judged is None:
            return {"top1": None, "top5": None, "loss": None}
        return figures(self.score(network, "scoring"))

    def calibration(self) -> list[Tensor]:
        """Batches of images to estimate norms with."""
        schedule = self.spec.schedule
        images = self.data.calibration(schedule.search.calibration_images, self.seed, held_out=schedule.held_out)
        batches = loader(images, _batch_for(self.spec), train=False, workers=workers_for(self.spec))
        return [x.to(self.accelerator.device) for x, _ in batches]


Evaluate = Callable[[nn.Module], Mapping[str, float]]


def figures(score: Score) -> dict[str, float | None]:
    """What a result says of a score."""
    return {"top1": score.top1, "top5": score.top5, "loss": score.loss}


def score(network: nn.Module, data: Data, watch: Watch, title: str, spec: ArchSpec) -> Score:
    """Accuracy on the validation images of a data set; several processes share its batches out."""
    images, size = data.val(), _batch_for(spec)
    gather = None
    if processes.count() > 1 and isinstance(images, ImageSet):
        part = processes.share_of(math.ceil(len(images) / size))
        images, gather = images.part(part.start * size, part.stop * size), processes.gathered
    batches: Any = loader(images, size, train=False, workers=workers_for(spec)) if len(images) else ()
    with watch.task(title, len(images)) as advance:
        return evaluate(network, batches, progress=advance, gather=gather)


def _batch_for(spec: ArchSpec) -> int:
    return max(1, min(_LARGEST_BATCH, _BATCH_PIXELS // (spec.input[1] * spec.input[2])))


def workers_for(spec: ArchSpec) -> int:
    """Processes that read images. They change no bit; small images are not worth starting any."""
    if max(spec.input[1:]) <= _IN_MEMORY:
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of the run on this host
    return max(1, min(_WORKERS, len(os.sched_getaffinity(0)) // here))


def start(device: str, precision: str, threads: int) -> Accelerator:
    """Claim device and threads.

    Raises:
        InputError: there is no such device here, or no such precision.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: got cuda, but torch finds no GPU here; allowed: cpu")
    processes.check_device(device)
    torch.set_num_threads(threads)
    return create_accelerator(precision, cpu=device == "cpu")


def open_for(spec: ArchSpec, name: str, model: nn.Module | None = None, *, labelled: bool = True) -> Data:
    """A data set, with the transforms that the spec's network wants; one without labels only if that is said.

    Raises:
        InputError: there is no such data.
    """
    config = data_config(create_model(spec) if model is None else model, spec.data)
    return open_data(name, input=spec.input, config=config, labelled=labelled)


def open_images(spec: ArchSpec, name: str, model: nn.Module | None = None) -> Data:
    """A data set whose labels need not be there: with a part to judge on if it has one, else all its images.

    Raises:
        InputError: there is no such data.
    """
    try:
        data = open_for(spec, name, model)
    except InputError:
        return open_for(spec, name, model, labelled=False)
    return data if judges(data) else open_for(spec, name, model, labelled=False)


def judges(data: Data) -> bool:
    """Whether a data set has labelled images apart from those to calibrate on."""
    return data.source.train is not None and data.source.val is not None


def _open(run: RunDirectory) -> tuple[Data, Data | None]:
    """A run's data, and the data whose labels it is judged by."""
    record, spec = run.record, run.spec
    if record.calibration is None or record.calibration.finetune:
        data = open_for(spec, record.data)
        return data, data
    data, judge = open_images(spec, record.data), record.calibration.judge
    if judge is None:
        return data, None
    return data, data if judge == record.data else open_for(spec, judge)


def absolute(data: str) -> str:
    """The name of a data set that means the same in every working directory."""
    kind, colon, path = data.partition(":")
    if kind in ("folder", "npz") and path:
        return f"{kind}{colon}{Path(path).expanduser().absolute()}"
    name, at, root = data.partition("@")
    return f"{name}{at}{Path(root).expanduser().absolute()}" if root and "://" not in root else data
