"""Files made wrong: those that once got a traceback, a hang or the memory, and a few hundred new ones."""

from pathlib import Path

import fuzz
import pytest
from fuzz_kinds import KINDS

from updp.errors import InputError

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())
CASES = {"specs": 60, "subnets": 100, "artefacts": 20, "npz": 100, "runs": 12}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """The readers, made when they are first asked for."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = KINDS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(CORPUS).as_posix() for path in FILES])
def test_what_was_found_is_answered(path, kinds):
    note, _, name = path.name.partition("--")
    assert note and name
    word, _, _ = fuzz.answer(kinds(path.parent.name).read, name, path.read_bytes())
    assert word in ("read", "refused")


def test_the_corpus_is_there():
    assert {path.parent.name for path in FILES} <= KINDS.keys()
    assert len(FILES) >= 9


@pytest.mark.parametrize("name", KINDS)
def test_files_made_wrong_are_answered(name, kinds):
    kind = kinds(name)
    words = [fuzz.answer(kind.read, *fuzz.mutant(kind, 1, number))[0] for number in range(CASES[name])]
    assert set(words) <= {"read", "refused"}
    assert "refused" in words


@pytest.mark.parametrize("name", KINDS)
def test_files_as_they_are_can_be_read(name, kinds):
    kind = kinds(name)
    seeds = kind.seeds.items() if isinstance(kind.seeds, dict) else [(kind.plain, kind.seeds[0])]
    for file, content in seeds:
        assert fuzz.answer(kind.read, file, content)[0] == "read", file


def test_a_case_is_the_same_again(kinds):
    kind = kinds("npz")
    assert fuzz.mutant(kind, 3, 5) == fuzz.mutant(kind, 3, 5) != fuzz.mutant(kind, 3, 6)


class Faulty:
    """A reader with every fault there is."""

    name = "faulty"

    def __init__(self, folder: Path) -> None:
        pass

    def mutated(self, rng):
        return "file", rng.randbytes(4)

    def read(self, name: str, content: bytes) -> None:
        raise {0: ValueError("no"), 1: InputError("told"), 2: InputError("")}[content[0] % 3]


def test_findings_are_found_and_kept(tmp_path, capfd):
    tally = fuzz.fuzz(Faulty, 0, range(30), tmp_path / "kept")
    assert tally.answers["refused"] and tally.answers["finding"] == len(tally.findings) > 10
    assert tally.answers.total() == 30
    assert {finding.partition(" ")[0] for finding in tally.findings} == {"ValueError", "refused"}
    assert 0 < len(list((tmp_path / "kept").iterdir())) <= 6
    assert "FOUND case" in capfd.readouterr().out


class Dying(Faulty):
    def read(self, name: str, content: bytes) -> None:
        fuzz.os._exit(3)


def test_a_process_that_dies_is_a_finding(tmp_path):
    tally = fuzz.fuzz(Dying, 0, range(3), tmp_path)
    assert tally.answers == {"finding": 3}
    assert all("the process died" in finding for finding in tally.findings)


class Hanging(Faulty):
    def read(self, name: str, content: bytes) -> None:
        fuzz.time.sleep(600)


def test_a_hang_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    tally = fuzz.fuzz(Hanging, 0, range(2), tmp_path)
    assert tally.answers == {"finding": 2}
    assert all("hung" in finding for finding in tally.findings)
