"""Trained networks on real photographs, where the optional shared data is: what ``updp eval`` must reproduce.

The folder is ``$UPDP_SHARED_DATA``, or ``../shared/data`` beside the checkout.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from updp import cli
from updp.data import DataConfig, open_data, stack
from updp.spec import TrainSettings

SHARED = Path(os.environ.get("UPDP_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
HALF = DataConfig(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875, interpolation="bilinear")
# The photographs are cropped already: they are resized whole.
WHOLE = ["data.crop_pct=1.0"]
NETWORKS = {
    "tf_efficientnet_lite0": ("tf_efficientnet_lite0.in1k", WHOLE, 82.3, 94.8),
    "mobilenetv2_100": (
        "mobilenetv2_100.in1k_qat_dequant",
        [
            *WHOLE,
            "model.pad_type=same",
            "data.mean=[0.5, 0.5, 0.5]",
            "data.std=[0.5, 0.5, 0.5]",
            "data.interpolation=bilinear",
        ],
        78.6,
        94.4,
    ),
}

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (SHARED / "images").is_dir(),
        reason=f"no shared data in {SHARED}: set UPDP_SHARED_DATA to a folder with images/ and weights/",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("spec", NETWORKS)
def test_eval_reproduces_the_published_accuracy(spec, capsys):
    weights, settings, top1, top5 = NETWORKS[spec]
    options = [option for setting in settings for option in ("--set", setting)]
    data = f"folder:{SHARED}/images/imagenet_val_1300_227"
    with pytest.raises(SystemExit) as left:
        cli.main(["eval", spec, "--weights", f"{SHARED}/weights/{weights}.safetensors", "--data", data, *options,
                  "--device", "cpu", "--json"])  # fmt: skip
    shown = capsys.readouterr()
    assert left.value.code == 0, shown.err
    found = json.loads(shown.out)
    assert found["images"] == 1300
    assert found["top1"] == pytest.approx(top1, abs=0.5)
    assert found["top5"] == pytest.approx(top5, abs=0.5)


@pytest.mark.parametrize(("name", "classes", "train", "val"), [("cifar10_jpegq75", 10, 5000, 10000)])
def test_packed_images(name, classes, train, val):
    data = open_data(f"npz:{SHARED}/images/{name}", input=(3, 32, 32), config=HALF)
    data.check_classes(classes)
    assert (len(data.source.train), len(data.val())) == (train, val)
    held_out = data.held_out(0.1, seed=0)
    images, labels = stack(held_out.first(50))
    assert images.shape == (50, 3, 32, 32)
    assert labels.bincount().tolist() == [5] * classes
    assert images.std() > 0.3
    assert len(data.train(TrainSettings(epochs=1), seed=0, held_out=0.1)) == train - len(held_out)


@pytest.mark.parametrize(("name", "images"), [("imagenet_sample_1000", 1000), ("imagenet_val_1300_227", 1300)])
def test_photographs_with_a_table_of_class_indices(name, images):
    data = open_data(f"folder:{SHARED}/images/{name}", input=(3, 224, 224), config=HALF)
    data.check_classes(1000)
    assert len(data.val()) == images
    assert 990 < data.num_classes <= 1000
    image, label = data.val()[0]
    assert image.shape == (3, 224, 224)
    assert 0 <= label < 1000
    assert torch.isfinite(image).all()


@pytest.mark.slow
def test_eval_reproduces_the_accuracy_of_a_network_of_no_library(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1] / "examples" / "cifar_resnet")
    weights, data = f"{SHARED}/weights/resnet56_cifar10.safetensors", f"npz:{SHARED}/images/cifar10_jpegq75"
    words = ["eval", "resnet56_cifar10.yaml", "--weights", weights, "--data", data]
    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--allow-module", "cifar_resnet", "--device", "cpu", "--json"])
    shown = capsys.readouterr()
    assert left.value.code == 0, shown.err
    found = json.loads(shown.out)
    assert (found["images"], found["top1"]) == (10_000, pytest.approx(83.2, abs=0.05))
