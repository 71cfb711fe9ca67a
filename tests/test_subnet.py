"""Subnet files: what is written is read again, and what is wrong is told."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updp.errors import InputError
from updp.subnet import MAX_BYTES, SubnetConfig

GOOD = {
    "version": 1,
    "spec": "small",
    "choices": {"blocks.1": "full", "blocks.0": "keep", "blocks.2": {"recipe": "a"}},
}
AVAILABLE = {f"blocks.{index}": ("pointwise", "full") for index in range(4)}


def read(**changes):
    data = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return SubnetConfig.from_json(json.dumps(data), "net.json")


def test_equal_choices_are_one_config():
    config = read()
    same = SubnetConfig("small", {"blocks.2": "a", "blocks.1": "full", "blocks.3": "keep"})
    assert (config, hash(config), config.key(), config.to_json()) == (
        same,
        hash(same),
        same.key(),
        same.to_json(),
    )
    assert config.pruned == ("blocks.1", "blocks.2")
    assert [config.choice(f"blocks.{index}") for index in range(3)] == ["keep", "full", "a"]
    assert json.loads(config.to_json()) == {
        "version": 1,
        "spec": "small",
        "choices": {"blocks.1": "full", "blocks.2": "a"},
    }


def test_key_is_the_same_in_every_process_and_differs_between_configs():
    assert SubnetConfig("small", {"blocks.1": "full"}).key() == "0a370245767e82daa82dfe6b"
    others = [SubnetConfig("small", {}), SubnetConfig("other", {}), SubnetConfig("small", {"a": "b"})]
    assert len({config.key() for config in others}) == 3


def test_what_is_said_about_a_subnet_is_kept_and_means_nothing(tmp_path):
    plain, told = read(), read(about="found by hand")
    assert (plain, hash(plain), plain.key()) == (told, hash(told), told.key())
    assert "about" not in plain.to_json()
    assert json.loads(told.to_json())["about"] == "found by hand"
    told.save(tmp_path / "net.json")
    assert SubnetConfig.load(tmp_path / "net.json").about == "found by hand"
    with pytest.raises(InputError, match="about: got 3, allowed: text"):
        read(about=3)


def test_choices_cannot_change():
    choices = {"blocks.1": "full"}
    config = SubnetConfig("small", choices)
    choices["blocks.2"] = "full"
    assert config.pruned == ("blocks.1",)
    with pytest.raises(TypeError):
        config.choices["blocks.2"] = "full"


TEXT = st.text(st.characters(codec=None))  # what JSON can hold, halves of surrogate pairs too


@given(st.dictionaries(TEXT, TEXT), TEXT)
def test_written_is_read_again(choices, spec):
    config = SubnetConfig(spec, choices)
    config.to_json().encode("ascii")
    assert len(config.key()) == 24
    assert SubnetConfig.from_json(config.to_json()) == config


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_other_json_gives_an_input_error(data):
    with pytest.raises(InputError):
        SubnetConfig.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"version": 2}, ["net.json: version: got 2, allowed: 1"]),
        ({"version": True}, ["net.json: version: got True, allowed: 1"]),
        ({"version": ...}, ["net.json: the key 'version' is missing"]),
        (
            {"spec": 3, "choice": {}},
            ["got 'choice', allowed: version, spec, choices, about (did you mean", "spec: got 3, allowed"],
        ),
        ({"choices": ["blocks.1"]}, ["net.json: choices: must be a mapping from block to choice"]),
        (
            {"choices": {"a": 1, "b": None}},
            ["choices['a']: got 1, allowed: a recipe's name", "choices['b']: got None"],
        ),
        (
            {"choices": {"a": {"recipe": 1}}},
            ["choices['a']: got 1, allowed: a recipe's name or {\"recipe\": NAME}"],
        ),
        (
            {"choices": {"a": {"recipe": "full", "widths": [1]}}},
            ["choices['a']: got 'widths', allowed: recipe; other keys are reserved"],
        ),
    ],
)
def test_bad_files(changes, messages):
    with pytest.raises(InputError) as caught:
        read(**changes)
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) == len(messages), problems
    assert all(message in problem for message, problem in zip(messages, problems, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "version": 1,\n}', "net.json:3:1: not JSON: "),
        ("", "net.json:1:1: not JSON: "),
        ('{"spec": "a", "spec": "b"}', "net.json: the key 'spec' is there twice"),
        ("[" * 100_000, "net.json: not JSON that updp can read"),
        ("1" * 10_000, "net.json: not JSON that updp can read"),
        ("3", "net.json: allowed: "),
    ],
)
def test_text_that_is_not_json(text, message):
    with pytest.raises(InputError) as caught:
        SubnetConfig.from_json(text, "net.json")
    assert str(caught.value).startswith(message)


def test_save_and_load(tmp_path):
    path = tmp_path / "net.json"
    read().save(path)
    assert SubnetConfig.load(path) == read()
    SubnetConfig("small", {}).save(path)
    assert SubnetConfig.load(path).pruned == ()
    assert [file.name for file in tmp_path.iterdir()] == ["net.json"]


def test_a_failed_save_leaves_nothing(tmp_path):
    target = tmp_path / "directory"
    target.mkdir()
    for path in (target, tmp_path / "none" / "net.json"):
        with pytest.raises(InputError, match="cannot be written"):
            read().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["directory"]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"spec": "caf\xe9"}')
    (tmp_path / "big.json").write_bytes(b" " * (MAX_BYTES + 1))
    expected = {
        "none.json": "cannot read the subnet: No such file",
        "latin.json": "not UTF-8 text",
        "big.json": "the file is larger than 1024 KiB",
        "": "cannot read the subnet: Is a directory",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match=message) as caught:
            SubnetConfig.load(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_check():
    SubnetConfig("small", {"blocks.1": "full", "blocks.3": "pointwise"}).check("small", AVAILABLE)
    with pytest.raises(InputError, match="spec: the subnet is for another spec: got 'small', allowed: large"):
        read().check("large", AVAILABLE)
    with pytest.raises(InputError) as caught:
        SubnetConfig("small", {"block.1": "full", "blocks.2": "ful", "blocks.3": "full"}).check("small", AVAILABLE)
    first, second = map(str, caught.value.problems)
    assert first.startswith("choices['block.1']: no such prunable block: got 'block.1', allowed: blocks.0, blocks.1,")
    assert second == (
        "choices['blocks.2']: no such choice: got 'ful', allowed: keep, pointwise, full (did you mean 'full'?)"
    )
