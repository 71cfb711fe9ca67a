"""docs/spec.md: it is what the generator gives, and every snippet in it is true.

A snippet is fenced with its language and, if it is a file, its name:

- ``yaml NAME``: a file; one without `version` changes the top-level sections of the file of that name that stands
  before it, or is a family file if there is none. A spec must pass its check.
- ``yaml``: a part of a spec, checked on top of rest.yaml.
- ``json NAME``: a subnet file.
- ``python NAME``: a module.
- ``console``: commands after ``$``, and what they print; spaces, line breaks and figures of rounding aside.
- ``pycon``: as in a Python session.
"""

import contextlib
import doctest
import importlib.util
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Caller

from updp.conformance import check_spec
from updp.spec import load_spec
from updp.subnet import SubnetConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "spec.md"
TEXT = PAGE.read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^(\w+):.*?(?=^\w+:|\Z)", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"\b\d(?:\.\d+)?e[+-]\d+\b")


@dataclass(frozen=True)
class Snippet:
    line: int
    language: str
    name: str | None
    text: str

    def __str__(self):
        return f"{self.line}-{self.name or self.language}"


SNIPPETS = [Snippet(TEXT.count("\n", 0, f.start()) + 1, f[1], f[2], f[3]) for f in FENCE.finditer(TEXT)]
CHECKED = {line.split()[3] for s in SNIPPETS for line in s.text.splitlines() if line.startswith("$ updp check ")}


def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of(language):
    found = [snippet for snippet in SNIPPETS if snippet.language == language]
    return pytest.mark.parametrize("snippet", found, ids=map(str, found))


def with_sections(old, new):
    """A file with some of its top-level sections replaced, each where it stands."""
    for found in SECTION.finditer(new):
        before, whole, behind = old.partition(next(s[0] for s in SECTION.finditer(old) if s[1] == found[1]))
        assert whole
        old = f"{before}{found[0].rstrip()}\n\n{behind}"
    return old


@pytest.fixture
def files(snippet, tmp_path, monkeypatch):
    """A directory with the files of the page as they are at a snippet."""
    monkeypatch.chdir(tmp_path)
    for other in SNIPPETS:
        if other.name is not None and other.line <= snippet.line:
            path = tmp_path / other.name
            part = path.exists() and "version:" not in other.text
            path.write_text(with_sections(path.read_text(), other.text) if part else other.text)
    return tmp_path


def plain(text):
    return FIGURE.sub("#", " ".join(text.split()))


def test_the_page_is_what_the_generator_gives():
    module = generator()
    made = module.render(module.TEMPLATE.read_text(encoding="utf-8"))
    assert made == TEXT, "run `make docs`"


def test_no_snippet_is_lost():
    assert len(SNIPPETS) * 2 == sum(line.lstrip().startswith("```") for line in TEXT.splitlines())
    assert {snippet.language for snippet in SNIPPETS} == {"yaml", "json", "python", "console", "pycon"}
    assert all(snippet.name for snippet in SNIPPETS if snippet.language in ("json", "python"))


def test_links_lead_somewhere():
    titles = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 10
    for link in links:
        assert link[1:] in titles if link.startswith("#") else (PAGE.parent / link).is_file(), link


@of("yaml")
def test_yaml(snippet, files):
    name = snippet.name or "part.yaml"
    if snippet.name is None:
        (files / name).write_text(f"version: 1\ninclude: rest.yaml\n{snippet.text}")
    elif "version:" not in (files / name).read_text():
        assert any(f"include: {name}\n" in other.text for other in SNIPPETS)  # it is checked where it is included
        return
    elif name in CHECKED:  # what is said of it stands on the page
        return
    report = check_spec(load_spec(files / name))
    assert report.blocks >= 1


@of("json")
def test_json(snippet, files):
    config = SubnetConfig.load(files / snippet.name)
    assert config.choices
    assert (files / f"{config.spec}.yaml").exists()


@of("console")
def test_console(snippet, files, capsys):
    call = Caller(capsys)
    sessions = re.split(r"^\$ ", snippet.text, flags=re.MULTILINE)
    assert not sessions[0]
    for session in sessions[1:]:
        command, _, expected = session.partition("\n")
        program, *arguments = shlex.split(command)
        if program == "python":
            assert arguments[0] == "-c"
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                exec(arguments[1], {})
            got = shown.getvalue()
        else:
            assert program == "updp"
            done = call(*arguments)
            got = done.out + done.err
            assert done.status == (2 if expected.startswith("error:") else 0), got
        assert plain(got) == plain(expected), got


@of("pycon")
def test_python_session(snippet, files):
    test = doctest.DocTestParser().get_doctest(snippet.text, {}, str(snippet), str(PAGE), snippet.line)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 0
    assert result.failed == 0
