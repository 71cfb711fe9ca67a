"""The package works from a checkout, as a built wheel and as an editable install."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import updp

ROOT = Path(__file__).parents[1]
SPECS = sorted(path.stem for path in (ROOT / "specs").glob("*.yaml"))

# Runs without site-packages' .pth files, so that an installed (or editable) updp of the test environment
# stays out of the way: the tree under test comes first, the other packages are found by their folder alone.
PROBE = """
import json, site, sys
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv[1])
sys.path += sys.argv[2:]
import updp
from updp.spec import list_specs, load_spec
after_import = [name for name in ("torch", "timm", "numpy") if name in sys.modules]
specs = list_specs()
print(json.dumps({
    "file": updp.__file__, "version": updp.__version__, "specs": specs, "heavy": after_import,
    "loaded": [load_spec(name).name for name in specs],
}))
"""
NATIVE = "import sys; sys.path.insert(0, sys.argv[1]); import updp._C; print(len(updp._C.rows()))"


def python(*arguments, cwd):
    """Output of the running Python, started afresh; its error output if it fails."""
    done = subprocess.run([sys.executable, "-S", *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def probe(folder, cwd):
    libraries = [entry for entry in sys.path if "site-packages" in entry]
    return json.loads(python("-c", PROBE, str(folder), *libraries, cwd=cwd))


def build(kind, out, scratch):
    """Calls the build backend as pip does, in this environment, and gives the file it wrote."""
    call = (
        "import sys, scikit_build_core.build as b;"
        f"print(getattr(b, 'build_{kind}')(sys.argv[1], {{'build-dir': sys.argv[2]}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", call, str(out), str(scratch)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", folder, folder / "build")


def check(found, place):
    assert Path(found["file"]).is_relative_to(place), found["file"]
    assert found["specs"] == found["loaded"] == SPECS
    assert len(SPECS) == 28
    assert found["version"] == updp.__version__
    assert found["heavy"] == []


def test_specs_are_found_in_a_checkout(tmp_path):
    check(probe(ROOT, cwd=tmp_path), ROOT / "updp")


def test_specs_are_found_in_a_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    check(probe(tmp_path / "installed", cwd=tmp_path), tmp_path / "installed")
    assert int(python("-c", NATIVE, str(tmp_path / "installed"), cwd=tmp_path)) == 24


def test_specs_are_found_in_an_editable_install(tmp_path):
    editable = build("editable", tmp_path, tmp_path / "build")
    zipfile.ZipFile(editable).extractall(tmp_path / "installed")
    names = {path.name for path in (tmp_path / "installed").iterdir()}
    assert any(name.endswith(".pth") for name in names), names
    check(probe(tmp_path / "installed", cwd=tmp_path), ROOT / "updp")


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if not name.startswith(("updp/", "updp-"))] == []
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "updp").rglob("*.py")}
    assert modules <= set(names)
    data = {f"updp/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "specs").rglob("*.*") if path.is_file()}
    assert {"updp/specs/families/schema.json", "updp/specs/subnets/resnet34/updp_p6.json"} <= data <= set(names)
    assert {"updp/py.typed", "updp/zoo/README.md"} <= set(names)
    assert len([name for name in names if re.match(r"updp/_C\..*so$", name)]) == 1
    assert [name for name in names if name.endswith("LICENSE")] != []


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert f"\nVersion: {updp.__version__}\n" in text
    assert "\nRequires-Python: >=3.11\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert "updp=updp.cli:main" in entry_points.replace(" ", "")


def test_sdist_holds_what_a_build_needs(tmp_path):
    sdist = build("sdist", tmp_path, tmp_path / "build")
    listed = subprocess.run(["tar", "tzf", sdist], capture_output=True, text=True, check=True).stdout.split()
    names = {name.partition("/")[2] for name in listed}
    assert {"pyproject.toml", "CMakeLists.txt", "LICENSE", "csrc/kernels.def", "updp/ops/conv.py"} <= names
    assert {f"specs/{name}.yaml" for name in SPECS} <= names
    assert [name for name in names if re.match(r"updp/_C\.|\.venv|build/|runs/", name)] == []


def requirements(name):
    return re.match(r"[A-Za-z0-9._-]+", name).group().lower().replace("_", "-")


def test_constraints_pin_all_direct_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", line) for line in lines)
    missing = {requirements(r) for r in listed} - {requirements(line) for line in lines}
    assert missing == {"updp"}
    assert len(lines) > 50


def test_public_names_are_lazy_and_resolve():
    homes = updp._HOMES
    assert set(updp.__all__) == {*homes, "__version__"}
    # A submodule of the same name would hide the public name once imported.
    assert [name for name in homes if (ROOT / "updp" / f"{name}.py").exists()] == []
    assert all(getattr(updp, name).__name__ == name for name in homes)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        updp.lod  # noqa: B018


def test_version_is_stated_once():
    texts = [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *(ROOT / "updp").rglob("*.py")]
    assert [path.name for path in texts if updp.__version__ in path.read_text()] == ["__init__.py"]
    try:
        installed = importlib.metadata.version("updp")
    except importlib.metadata.PackageNotFoundError:
        return  # run from a source tree
    assert installed == updp.__version__
