import csv
import gc
import io
import math
import pickle
import random
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import IterableImageDataset

from updp.data import Data, DataConfig, ImageError, StreamSet, data_config, factory, loader, open_data, stack
from updp.data.sources import stratified_order
from updp.errors import InputError
from updp.spec import DataSettings, TrainSettings

HALF = DataConfig(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875, interpolation="bilinear")
PLAIN = TrainSettings(epochs=1)
AUGMENTED = TrainSettings(epochs=1, scale=(0.5, 1.0), hflip=0.5, reprob=0.5, auto_augment="rand-m9-n2-mstd0.5")


def opened(name: str, size: int = 16, **config: object) -> Data:
    return open_data(name, input=(3, size, size), config=replace(HALF, **config))


def picture(value: int, size: int = 20) -> Image.Image:
    """A picture that its first pixel tells from others."""
    pixels = np.full((size, size, 3), value, np.uint8)
    pixels[:, size // 2 :] = 255 - value
    return Image.fromarray(pixels)


def write_classes(folder: Path, classes: dict[str, int]) -> Path:
    """A folder per class with so many pictures."""
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(20 * number + index).save(folder / name / f"{index}.png")
    return folder


def write_table(folder: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("file", "label")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate({row[0] for row in rows if row and row[0].endswith(".png")}):
        picture(index).save(folder / name)
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    picture(value).save(file, "JPEG")
    return file.getvalue()


def write_packed(path: Path, labels: list[int], **changes: object) -> Path:
    images = [jpeg(10 * index) for index in range(len(labels))]
    arrays = {
        "data": np.frombuffer(b"".join(images), np.uint8),
        "offset": np.cumsum([0, *map(len, images)]),
        "label": np.array(labels, np.int16),
        "classes": np.array(["cat", "dog"]),
    }
    arrays = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def labels_of(dataset) -> list[int]:
    return stack(dataset)[1].tolist()


@pytest.fixture(scope="module")
def digits() -> Data:
    return opened("digits", size=32)


class TestDigits:
    def test_sizes_and_classes(self, digits):
        assert (len(digits.source.train), len(digits.val()), digits.num_classes) == (1437, 360, 10)
        assert digits.describe()["train_images"] == 1437

    def test_the_test_images_have_the_classes_in_proportion_and_never_change(self, digits):
        images, labels = stack(digits.val())
        counts = labels.bincount()
        assert counts.tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
        assert images.shape == (360, 3, 32, 32)
        first = digits.source.val.labels[:10]
        assert first == [3, 5, 5, 8, 5, 7, 1, 1, 5, 2]

    def test_pixels_are_normalised_and_not_cropped(self, digits):
        image, _ = digits.val()[0]
        assert (digits.config.crop_pct, HALF.crop_pct) == (1.0, 0.875)
        assert image.min() == -1
        assert 0.5 < image.max() <= 1
        drawn = torch.tensor(np.asarray(digits.source.val.images[0], np.float32) / 127.5 - 1)
        assert torch.allclose(image, drawn.expand(3, 32, 32), atol=1e-6)

    def test_other_input_sizes_and_grey(self):
        assert opened("digits", size=24).val()[0][0].shape == (3, 24, 24)
        grey = open_data("digits", input=(1, 32, 32), config=HALF)
        assert grey.config.mean == (0.5,)
        assert grey.val()[0][0].shape == (1, 32, 32)


class TestParts:
    def test_nothing_held_out_is_trained_on_or_calibrated_with(self, digits):
        for seed, fraction in ((0, 0.1), (1, 0.1), (1, 0.25)):
            held = set(digits.held_out(fraction, seed).indices)
            train = set(digits.train(PLAIN, seed=seed, held_out=fraction).indices)
            calibration = set(digits.calibration(200, seed, held_out=fraction).indices)
            assert len(held) == round(1437 * fraction)
            assert held | train == set(range(1437))
            assert not held & train
            assert len(calibration) == 200
            assert calibration <= train

    def test_the_seed_decides(self, digits):
        assert digits.held_out(0.1, 0).indices == digits.held_out(0.1, 0).indices
        assert set(digits.held_out(0.1, 0).indices) != set(digits.held_out(0.1, 1).indices)

    @pytest.mark.parametrize("count", [40, 130])
    def test_any_beginning_of_the_held_out_images_has_the_classes_in_proportion(self, digits, count):
        train = torch.tensor(digits.source.train.labels).bincount()
        found = torch.tensor(labels_of(digits.held_out(0.1, 3).first(count))).bincount(minlength=10)
        assert found.sum() == count
        assert ((found - train * count / 1437).abs() < 1.5).all()

    def test_nothing_held_out(self, digits):
        assert len(digits.train(PLAIN, seed=0, held_out=0.0)) == 1437
        with pytest.raises(InputError, match="held_out 0, allowed: above 0"):
            digits.held_out(0.0, 0)

    def test_all_held_out(self, tmp_path):
        write_classes(tmp_path / "train", {"a": 1})
        data = opened(f"folder:{tmp_path}")
        with pytest.raises(InputError, match=r"held_out 0\.5 leaves no image to train on"):
            data.train(PLAIN, seed=0, held_out=0.5)

    def test_calibration_may_ask_for_more_than_there_is(self, digits):
        assert len(digits.calibration(5000, 0, held_out=0.1)) == 1437 - 144

    def test_order_is_the_same_in_every_version(self):
        assert stratified_order([0, 0, 0, 0, 1, 1], seed=0) == [5, 3, 2, 4, 1, 0]
        assert sorted(stratified_order(list(range(50)), seed=1)) == list(range(50))


class TestAugmentation:
    def test_without_settings_it_is_the_resized_image(self, digits):
        train = digits.train(PLAIN, seed=0, held_out=0.1)
        judged = digits._judged(digits.source.train, train.indices)
        assert all(torch.equal(train[index][0], judged[index][0]) for index in (0, 7, 500))

    def test_without_scale_the_centred_square_is_resized(self, tmp_path):
        (tmp_path / "train" / "a").mkdir(parents=True)
        wide = Image.new("RGB", (48, 16))
        wide.paste((255, 0, 0), (16, 0, 32, 16))
        wide.save(tmp_path / "train" / "a" / "wide.png")
        image, _ = opened(f"folder:{tmp_path}").train(PLAIN, seed=0, held_out=0.0)[0]
        assert image[0].min() == 1
        assert image[1:].max() == -1

    def test_depends_on_seed_epoch_and_image_and_nothing_else(self, digits):
        train = digits.train(AUGMENTED, seed=0, held_out=0.1)
        torch.manual_seed(1)
        random.seed(1)
        first = train[0, 5][0]
        assert torch.equal(train[0, 5][0], first)
        assert torch.equal(train[5][0], first)
        assert not torch.equal(train[1, 5][0], first)
        assert not torch.equal(digits.train(AUGMENTED, seed=1, held_out=0.1)[0, 5][0], first)
        everything = digits.train(AUGMENTED, seed=0, held_out=0.0)
        same = everything.indices.index(train.indices[5])
        assert torch.equal(everything[0, same][0], first)

    def test_leaves_the_generators_alone(self, digits):
        def draws() -> tuple[float, float, float]:
            return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)
        expected = draws()
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)
        batches = loader(digits.train(AUGMENTED, seed=0, held_out=0.1), 32, train=True, seed=0)
        next(iter(batches))
        assert draws() == expected

    @pytest.mark.parametrize(
        "setting", [{"hflip": 1.0}, {"scale": (0.2, 0.3)}, {"auto_augment": "rand-m9"}, {"reprob": 1.0}]
    )
    def test_every_setting_changes_images(self, digits, setting):
        plain = digits.train(PLAIN, seed=0, held_out=0.1)
        train = digits.train(replace(PLAIN, **setting), seed=0, held_out=0.1)
        assert sum(not torch.equal(train[index][0], plain[index][0]) for index in range(12)) >= 6


class TestLoader:
    def batches(self, data: Data, epoch: int, *, batch_size: int = 256, workers: int = 0) -> list:
        found = loader(data.train(AUGMENTED, seed=0, held_out=0.1), batch_size, train=True, seed=0, workers=workers)
        found.set_epoch(epoch)
        return list(found)

    def test_shapes_types_and_equal_batches(self, digits):
        batches = self.batches(digits, 0)
        assert len(batches) == (1437 - 144) // 256
        assert {images.shape for images, _ in batches} == {(256, 3, 32, 32)}
        assert {(images.dtype, labels.dtype) for images, labels in batches} == {(torch.float32, torch.int64)}

    def test_an_epoch_is_the_same_whenever_it_is_asked_for(self, digits):
        batches = loader(digits.train(AUGMENTED, seed=0, held_out=0.1), 64, train=True, seed=0)
        first, same = next(iter(batches)), next(iter(batches))
        batches.set_epoch(1)
        second = next(iter(batches))
        torch.rand(5)
        batches.set_epoch(0)
        again = next(iter(batches))
        for images, labels in (same, again):
            assert torch.equal(images, first[0])
            assert torch.equal(labels, first[1])
        assert not torch.equal(second[1], first[1])
        assert not torch.equal(second[0], first[0])

    def test_workers_change_nothing(self, digits):
        alone, together = (self.batches(digits, 2, batch_size=500, workers=workers) for workers in (0, 2))
        assert len(alone) == len(together) == 2
        for (images, labels), (others, other_labels) in zip(alone, together, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)

    def test_accelerate_changes_nothing(self, digits):
        prepared = Accelerator(cpu=True).prepare(
            loader(digits.train(AUGMENTED, seed=0, held_out=0.1), 64, train=True, seed=0)
        )
        plain = loader(digits.train(AUGMENTED, seed=0, held_out=0.1), 64, train=True, seed=0)
        for epoch in (0, 3):
            prepared.set_epoch(epoch)
            plain.set_epoch(epoch)
            images, labels = next(iter(prepared))
            expected = next(iter(plain))
            assert torch.equal(images, expected[0])
            assert torch.equal(labels, expected[1])

    def test_judging_takes_every_image_in_order(self, digits):
        batches = list(loader(digits.val(), 64, train=False))
        assert [len(labels) for _, labels in batches] == [64] * 5 + [40]
        assert torch.cat([labels for _, labels in batches]).tolist() == digits.source.val.labels

    def test_fewer_images_than_a_batch_are_one_batch(self, tmp_path):
        write_classes(tmp_path / "train", {"a": 2, "b": 3})
        train = opened(f"folder:{tmp_path}").train(PLAIN, seed=0, held_out=0.0)
        assert [len(labels) for _, labels in loader(train, 64, train=True)] == [5]

    def test_data_sets_survive_pickling(self, digits, tmp_path):
        write_packed(tmp_path / "train.npz", [0, 1])
        packed = opened(f"npz:{tmp_path}")
        for dataset in (digits.train(AUGMENTED, seed=0, held_out=0.1), packed.train(PLAIN, seed=0, held_out=0.0)):
            copy = pickle.loads(pickle.dumps(dataset))
            assert torch.equal(copy[0, 1][0], dataset[0, 1][0])


class TestConfig:
    model = SimpleNamespace(
        pretrained_cfg={"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9, "interpolation": "bilinear"}
    )

    def test_is_the_models_own(self):
        expected = DataConfig((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.9, "bilinear", "center")
        assert data_config(self.model) == data_config(self.model, DataSettings()) == expected

    def test_the_spec_overrides_it(self):
        found = data_config(self.model, DataSettings(mean=(0.5, 0.5, 0.5), crop_pct=1.0))
        assert found == DataConfig((0.5, 0.5, 0.5), (0.4, 0.5, 0.6), 1.0, "bilinear", "center")

    def test_a_model_that_says_nothing_is_refused(self):
        with pytest.raises(TypeError, match="Linear was not made by timm"):
            data_config(torch.nn.Linear(1, 1))

    def test_channels(self):
        assert open_data("digits", input=(3, 32, 32), config=replace(HALF, mean=(0.3,))).config.mean == (0.3,) * 3
        with pytest.raises(InputError, match="4 channels, allowed: 1"):
            open_data("digits", input=(4, 32, 32), config=HALF)
        with pytest.raises(InputError, match=r"data\.std has 2 values"):
            open_data("digits", input=(3, 32, 32), config=replace(HALF, std=(1.0, 1.0)))

    def test_crop_and_resize_when_judging(self, tmp_path):
        write_classes(tmp_path, {"a": 1})
        whole, cropped = (opened(f"folder:{tmp_path}", crop_pct=crop).val()[0][0] for crop in (1.0, 0.5))
        assert whole.shape == cropped.shape == (3, 16, 16)
        bright = math.isclose(whole[0, 0, 0].item(), -1, abs_tol=0.02)
        assert bright
        assert not torch.equal(whole, cropped)


class TestFolder:
    def test_train_and_val_with_a_folder_per_class(self, tmp_path):
        write_classes(tmp_path / "train", {"class10": 2, "class9": 3, ".hidden": 1})
        write_classes(tmp_path / "val", {"class10": 1})
        (tmp_path / "train" / "class9" / "deeper").mkdir()
        picture(0).save(tmp_path / "train" / "class9" / "deeper" / "x.JPG", "JPEG")
        (tmp_path / "train" / "class9" / "notes.txt").write_text("no image")
        data = opened(f"folder:{tmp_path}")
        assert data.source.classes == ("class9", "class10")
        assert sorted(labels_of(data.train(PLAIN, seed=0, held_out=0.0))) == [0, 0, 0, 0, 1, 1]
        assert labels_of(data.val()) == [1]

    @pytest.mark.parametrize("name", ["valid", "validation", "test"])
    def test_other_names_of_val(self, tmp_path, name):
        write_classes(tmp_path / name, {"a": 1})
        assert len(opened(f"folder:{tmp_path}").val()) == 1

    def test_one_set_is_to_judge_on(self, tmp_path):
        data = opened(f"folder:{write_classes(tmp_path, {'a': 1, 'b': 2})}")
        assert labels_of(data.val()) == [0, 1, 1]
        with pytest.raises(InputError, match="has no training images"):
            data.train(PLAIN, seed=0, held_out=0.1)

    def test_training_images_alone(self, tmp_path):
        write_classes(tmp_path / "train", {"a": 1})
        with pytest.raises(InputError, match="has no images to judge on"):
            opened(f"folder:{tmp_path}").val()

    def test_table_of_class_indices(self, tmp_path):
        write_table(tmp_path, [("b.png", "7", "x"), ("a.png", "0", "y")], ("file", "label", "wnid"))
        data = opened(f"folder:{tmp_path}")
        assert (labels_of(data.val()), data.num_classes, data.source.classes) == ([7, 0], 8, None)
        data.check_classes(1000)
        data.check_classes(8)
        with pytest.raises(InputError, match="has labels up to 7, but the model has 7 classes"):
            data.check_classes(7)

    def test_table_of_class_names(self, tmp_path):
        write_table(tmp_path / "train", [("b.png", "dog"), ("a.png", "cat")], ("filename", "class"))
        write_table(tmp_path / "val", [("c.png", "dog")])
        data = opened(f"folder:{tmp_path}")
        assert (data.source.classes, labels_of(data.val())) == (("cat", "dog"), [1])

    def test_named_classes_must_be_as_many_as_the_models(self, tmp_path):
        data = opened(f"folder:{write_classes(tmp_path, {'a': 1, 'b': 2})}")
        data.check_classes(2)
        with pytest.raises(InputError, match=r"has 2 classes, but the model has 1000; .* labels\.csv"):
            data.check_classes(1000)

    def test_all_problems_of_a_table_at_once(self, tmp_path):
        write_table(tmp_path, [("a.png", "0"), ("gone.jpg", "1"), ("b.png", "cat"), ("c.png",), ("d.png", "")])
        with pytest.raises(InputError) as caught:
            opened(f"folder:{tmp_path}")
        assert str(caught.value).splitlines() == [
            f"{tmp_path}/labels.csv:3: file: got 'gone.jpg', but there is no such file",
            f"{tmp_path}/labels.csv:4: label: got 'cat', allowed: a class index, as in the first row",
            f"{tmp_path}/labels.csv:5: label: is empty",
            f"{tmp_path}/labels.csv:6: label: is empty",
        ]

    def test_many_problems_are_counted(self, tmp_path):
        write_table(tmp_path, [(f"{index}.jpg", "0") for index in range(15)])
        with pytest.raises(InputError) as caught:
            opened(f"folder:{tmp_path}")
        lines = str(caught.value).splitlines()
        assert len(lines) == 11
        assert lines[-1] == f"{tmp_path}/labels.csv: and 5 more problems"

    def test_tables_that_are_none(self, tmp_path):
        table = write_table(tmp_path, [("a.png", "0")], ("picture", "label")) / "labels.csv"
        with pytest.raises(
            InputError, match=r"labels.csv:1: no column file or filename .*; got the columns picture, label"
        ):
            opened(f"folder:{tmp_path}")
        table.write_text("")
        with pytest.raises(InputError, match="got the columns none"):
            opened(f"folder:{tmp_path}")
        table.write_text("file,label\n")
        with pytest.raises(InputError, match=r"labels\.csv: no images"):
            opened(f"folder:{tmp_path}")
        table.write_bytes(b"file,label\n\xff\xfe,0\n")
        with pytest.raises(InputError, match="not a csv file"):
            opened(f"folder:{tmp_path}")
        table.write_text("file,label\na.png,99999999999999999999\n")
        assert opened(f"folder:{tmp_path}").source.classes == ("99999999999999999999",)
        table.rename(tmp_path / "one.csv")
        (tmp_path / "two.csv").write_text("")
        with pytest.raises(InputError, match=r"several csv files \(one.csv, two.csv\)"):
            opened(f"folder:{tmp_path}")

    def test_train_and_val_that_do_not_fit(self, tmp_path):
        write_classes(tmp_path / "train", {"a": 1, "b": 1})
        write_classes(tmp_path / "val", {"c": 1})
        with pytest.raises(InputError, match="val: classes that the training images do not have: c"):
            opened(f"folder:{tmp_path}")
        write_table(tmp_path / "val", [("a.png", "0")])
        with pytest.raises(InputError, match="the labels of train and val must both be"):
            opened(f"folder:{tmp_path}")

    def test_folders_that_are_none(self, tmp_path):
        file = tmp_path / "file"
        file.write_text("")
        (tmp_path / "empty" / "a").mkdir(parents=True)
        (tmp_path / "unlabelled").mkdir()
        picture(0).save(tmp_path / "unlabelled" / "a.png")
        for name, message in {
            f"folder:{tmp_path}/gone": f"{tmp_path}/gone: no such folder",
            f"folder:{file}": f"{file}: is a file, allowed: a folder",
            f"folder:{tmp_path}/empty": f"{tmp_path}/empty: no images; allowed: .bmp, .gif",
            f"folder:{tmp_path}/unlabelled": f"{tmp_path}/unlabelled: images without labels; allowed: one folder per",
            "folder:": "data 'folder:': say where it is: folder:PATH",
            "npz": "data 'npz': say where it is: npz:PATH",
        }.items():
            with pytest.raises(InputError) as caught:
                opened(name)
            assert str(caught.value).startswith(message)


class TestBrokenImages:
    @pytest.fixture
    def broken(self, tmp_path) -> Data:
        write_classes(tmp_path, {"a": 3})
        whole = jpeg(0)
        (tmp_path / "a" / "1.jpg").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "a" / "2.png").write_bytes(b"no image")
        return opened(f"folder:{tmp_path}")

    def test_the_file_is_named(self, broken, tmp_path):
        images = broken.val()
        assert len(images) == 4
        assert images[0][1] == 0
        for index, name in ((1, "1.jpg"), (3, "2.png")):
            with pytest.raises(ImageError, match=f"{tmp_path}/a/{name}: cannot be read as an image: ") as caught:
                images[index]
            assert caught.value.exit_status == 2
            assert "\n" not in str(caught.value)

    def test_the_message_is_one_line_out_of_a_worker_process(self, broken, tmp_path):
        batches = iter(loader(broken.val(), 2, train=False, workers=1))
        message = ""
        try:  # pytest.raises would keep the traceback, and with it the worker, which then takes seconds to end
            next(batches)
        except ImageError as error:
            message = str(error.with_traceback(None))
        assert message.startswith(f"{tmp_path}/a/1.jpg: cannot be read as an image: ")
        assert "\n" not in message


class TestPacked:
    def test_folder_of_train_and_test(self, tmp_path):
        write_packed(tmp_path / "train_5k.npz", [0, 1, 1])
        write_packed(tmp_path / "test_10k.npz", [1, 0])
        data = opened(f"npz:{tmp_path}")
        data.check_classes(2)
        assert (data.source.classes, data.num_classes) == (("cat", "dog"), 2)
        assert sorted(labels_of(data.train(PLAIN, seed=0, held_out=0.0))) == [0, 1, 1]
        images, labels = stack(data.val())
        assert labels.tolist() == [1, 0]
        assert (images[0, 0, 0, 0] + 1).abs() < 0.03
        assert (images[1, 0, 0, 0] + 1 - 10 / 127.5).abs() < 0.03

    def test_one_file_is_to_judge_on(self, tmp_path):
        data = opened(f"npz:{write_packed(tmp_path / 'train.npz', [0])}")
        assert len(data.val()) == 1
        with pytest.raises(InputError, match="has no training images"):
            data.train(PLAIN, seed=0, held_out=0.1)

    def test_a_broken_image_is_named(self, tmp_path):
        path = write_packed(tmp_path / "val.npz", [0, 1], offset=np.array([0, 5, 900]))
        with pytest.raises(ImageError, match=r"val\.npz: image 0: cannot be read"):
            opened(f"npz:{path}").val()[0]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"offset": None}, "offset"),
            ({"label": np.array([0, 2])}, "labels from 0 to 2, but 2 classes"),
            ({"label": np.array([-1, 0])}, "labels from -1 to 0"),
            ({"label": np.array([0])}, "1 labels and 3 offsets"),
            ({"label": np.array([], int), "offset": np.array([0])}, "0 labels and 1 offsets"),
            ({"label": np.array([0.0, 1.0])}, "label is 1-D float64; allowed: data 1-D uint8"),
            ({"offset": np.array([0, 9, 5])}, "the offsets must rise"),
            ({"offset": np.array([0, 9, 10**9])}, "the offsets must rise and stay within"),
            ({"data": np.zeros(9, np.uint16)}, "data is 1-D uint16"),
            ({"data": np.zeros((3, 3), np.uint8)}, "data is 2-D uint8"),
            ({"classes": np.array([{"cat": 1}, None])}, "Object arrays cannot be loaded"),
        ],
    )
    def test_arrays_that_do_not_fit(self, tmp_path, changes, message):
        path = write_packed(tmp_path / "val.npz", [0, 1], **changes)
        with pytest.raises(InputError) as caught:
            opened(f"npz:{path}")
        assert str(caught.value).startswith(str(path))
        assert message in str(caught.value)

    @pytest.mark.parametrize("keep", [0, 10, 300, -30])
    def test_truncated_file(self, tmp_path, keep):
        path = write_packed(tmp_path / "val.npz", [0, 1])
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(InputError, match=r"val\.npz: damaged, or not an npz file"):
            opened(f"npz:{path}")

    def test_flipped_bytes(self, tmp_path):
        path = write_packed(tmp_path / "val.npz", [0, 1])
        content = bytearray(path.read_bytes())
        content[200:240] = b"\0" * 40
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            opened(f"npz:{path}")

    def test_folders_that_do_not_fit(self, tmp_path):
        with pytest.raises(InputError, match="gone: no such folder"):
            opened(f"npz:{tmp_path}/gone")
        with pytest.raises(InputError, match="no images; allowed: train"):
            opened(f"npz:{tmp_path}")
        write_packed(tmp_path / "train.npz", [0])
        write_packed(tmp_path / "val.npz", [0], classes=np.array(["cat", "cow"]))
        with pytest.raises(InputError, match=r"the class lists of train\.npz and val\.npz differ"):
            opened(f"npz:{tmp_path}")
        write_packed(tmp_path / "val2.npz", [0])
        with pytest.raises(InputError, match="several files for one set"):
            opened(f"npz:{tmp_path}")


class Reader:
    """What timm's stream readers look like from outside: 40 images of 4 classes."""

    class_to_idx: dict[str, int]

    def __init__(self, *, shuffle: bool, seed: int) -> None:
        self.class_to_idx = {}
        self.order = list(range(40))
        if shuffle:
            random.Random(seed).shuffle(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self):
        return ((picture(index), index % 4) for index in self.order)


class TestFactory:
    @pytest.fixture
    def stream(self, monkeypatch) -> Data:
        def create(name, *, is_training, seed, **_):
            assert name == "wds/set"
            return IterableImageDataset("", reader=Reader(shuffle=is_training, seed=seed))

        monkeypatch.setattr(factory, "create_dataset", create)
        monkeypatch.setattr(factory.Path, "exists", lambda _: True)
        return opened("wds/set,classes=4@/data")

    def first_pixels(self, dataset) -> list[int]:
        return [round((image[0, 0, 0].item() + 1) * 127.5) for image, _ in dataset]

    def test_folders_of_torchvision(self, tmp_path):
        write_classes(tmp_path / "train", {"a": 2, "b": 2})
        write_classes(tmp_path / "val", {"a": 1, "b": 1})
        data = opened(f"torch/image_folder@{tmp_path}")
        assert (data.source.classes, data.num_classes) == (("a", "b"), 2)
        assert sorted(labels_of(data.train(PLAIN, seed=0, held_out=0.0))) == [0, 0, 1, 1]
        assert labels_of(data.val()) == [0, 1]

    def test_one_folder_is_not_both_sets(self, tmp_path):
        data = opened(f"torch/image_folder@{write_classes(tmp_path, {'a': 2})}")
        assert len(data.val()) == 2
        with pytest.raises(InputError, match="no training images: there is one set"):
            data.train(PLAIN, seed=0, held_out=0.1)

    def test_tar_file(self, tmp_path):
        write_classes(tmp_path / "set", {"a": 2, "b": 1})
        (tmp_path / "set" / "a" / "0.png").write_bytes(b"no image")
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            tar.add(tmp_path / "set", arcname=".")
        images = opened(f"tar@{tmp_path}/set.tar").val()
        assert [images[index][1] for index in (1, 2)] == [0, 1]
        with pytest.raises(ImageError, match="cannot be read as an image"):
            images[0]
        with warnings.catch_warnings(action="ignore"):  # timm's reader never closes its file
            del images
            gc.collect()

    def test_names_that_cannot_be_opened(self, tmp_path, monkeypatch):
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            monkeypatch.delenv(variable, raising=False)
        for name, message in {
            "digit": "(did you mean 'digits'?)",
            "torchh/cifar10": "got 'torchh/', allowed: torch/, hfds/, hfids/, tfds/, wds/ (did you mean 'torch/'?)",
            "torch/cifar10": "say where it is: torch/cifar10@FOLDER",
            "torch/cifar10@/nowhere": "/nowhere: no such folder",
            f"torch/cifar10@{tmp_path}": "Dataset not found",
            f"torch/nothing@{tmp_path}": "Unknown torchvision dataset nothing",
            "hfds/user/set": "is fetched from the network; write hfds/user/set,download",
            "wds/set,download@pipe:echo": "the root is a command",
            "torch/cifar10,dwnload@/data": "option got 'dwnload', allowed: download",
            "torch/cifar10,train@/data": "got 'train', allowed: train=VALUE",
            "torch/cifar10,download=1@/data": "allowed: download without a value",
            "torch/cifar10,classes=x@/data": "allowed: a number above 0",
        }.items():
            with pytest.raises(InputError) as caught:
                opened(name)
            assert str(caught.value).startswith(f"data {name!r}: ")
            assert message in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_a_missing_package_is_named(self, tmp_path, monkeypatch, capsys):
        def create(*_, **__):
            print("Please install the package.")
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

        monkeypatch.setattr(factory, "create_dataset", create)
        with pytest.raises(InputError, match="needs the package datasets, which is not installed"):
            opened("hfds/user/set,download")
        assert capsys.readouterr().out == ""

    def test_classes_of_a_stream_must_be_told(self, stream):
        assert (stream.num_classes, stream.source.classes) == (4, None)
        with pytest.raises(InputError, match="does not say how many classes it has; write wds/set,classes=N"):
            opened("wds/set@/data")

    def test_parts_of_a_stream_do_not_overlap(self, stream):
        train = set(self.first_pixels(stream.train(PLAIN, seed=0, held_out=0.3)))
        held = self.first_pixels(stream.held_out(0.3, 0))
        calibration = self.first_pixels(stream.calibration(10, 0, held_out=0.3))
        assert held
        assert len(calibration) == 10
        assert not train & set(held)
        assert not set(held) & set(calibration)
        assert self.first_pixels(stream.held_out(0.3, 0)) == held
        assert self.first_pixels(stream.held_out(0.3, 1)) != held
        assert self.first_pixels(stream.val()) == list(range(40))

    def test_training_on_a_stream(self, stream):
        train = stream.train(AUGMENTED, seed=0, held_out=0.3)
        assert isinstance(train, StreamSet)
        batches = loader(train, 8, train=True, seed=0)
        assert len(list(batches)) == len(batches) == 28 // 8
        first = next(iter(batches))
        batches.set_epoch(1)
        second = next(iter(batches))
        batches.set_epoch(0)
        again = next(iter(batches))
        assert torch.equal(first[0], again[0])
        assert not torch.equal(first[0], second[0])

    def test_several_workers_read_no_more_than_there_is(self, stream):
        assert len(list(loader(stream.calibration(9, 0, held_out=0.1), 1, train=False, workers=2))) == 9
