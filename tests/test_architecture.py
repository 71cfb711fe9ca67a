"""Rules of the house that no single module can keep: arrows, names, counts, code that must never appear."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from updp.spec import list_specs, load_spec

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "updp"

# Rooms by floor. A room imports rooms of lower floors, and of its own floor those that stand before it.
FLOORS = {
    0: ["updp", "errors", "frozen", "files"],
    1: [
        "spec",
        "subnet",
        "measure",
        "processes",
        "ops",
        "affine",
        "layers",
        "kinds",
        "flow",
        "hooks",
        "randomize",
        "problems",
        "allowed",
        "packaged",
    ],
    2: ["models", "structure", "widths", "padding", "composing", "runs", "recipe", "data"],
    3: ["stretches", "supernet", "merging", "certificate", "graph", "oracle", "conformance", "artefact"],
    4: ["search", "train", "calibrate", "draft", "exporting", "deployment", "zoo", "tables"],
    5: ["report", "pipeline", "bench"],
    6: ["cli", "__main__"],
}
ORDER = [room for floor in sorted(FLOORS) for room in FLOORS[floor]]
WITHOUT_TORCH = ["allowed", "errors", "files", "frozen", "packaged", "spec", "subnet"]

# Families of networks; those of the specs are added. updp knows none of them.
FAMILIES = {
    "alexnet", "beit", "cait", "coatnet", "convnext", "deit", "densenet", "edgenext", "efficientnet",
    "fastvit", "ghostnet", "inception", "levit", "maxvit", "mcunet", "mnasnet", "mobilenet",
    "mobileone", "mobilevit", "poolformer", "regnet", "repvgg", "repvit", "resmlp", "resnet", "resnext",
    "shufflenet", "squeezenet", "swin", "vgg", "vit", "xception", "xcit",
}  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "updp"


def imports_of(module: str, tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """Modules of updp that a module imports anywhere, functions included."""
    package = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in known else base for name in names}
    return {name for name in found if name.split(".")[0] == "updp"}


def upward_imports(trees: dict[str, ast.AST], known: dict[str, Path]) -> list[str]:
    """Imports that do not point down, as "module -> module"."""
    wrong = []
    for module, tree in trees.items():
        if module == "updp":  # its public names load on first use; what it does on import is tested below
            continue
        for imported in sorted(imports_of(module, tree, known)):
            own, other = room_of(module), room_of(imported)
            if {own, other} <= set(ORDER) and ORDER.index(other) > ORDER.index(own):
                wrong.append(f"{module} -> {imported}")
    return wrong


def dangerous_code(tree: ast.AST) -> list[str]:
    """Constructs that run code from files or strings."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_IMPORTS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_IMPORTS:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            found += _dangerous_call(node)
    return found


def _dangerous_call(call: ast.Call) -> list[str]:
    if isinstance(call.func, ast.Name):
        return [call.func.id] if call.func.id in FORBIDDEN_CALLS else []
    name = ast.unparse(call.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    is_bad = (
        (name == "torch.load" and options.get("weights_only") != "True")
        or (name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False")
        or (name.startswith("yaml.") and name.removeprefix("yaml.") in FORBIDDEN_YAML)
        or name in ("os.system", "os.popen", "builtins.eval", "builtins.exec")
        or options.get("shell", "False") != "False"
    )
    return [name] if is_bad else []


@functools.cache
def family_names() -> set[str]:
    """The fixed list, and the letters that the names of the specs and of their models begin with."""
    names = {load_spec(name).model.name.removeprefix("tf_") for name in list_specs()} | set(list_specs())
    words = {re.match("[a-z]*", name.rpartition("/")[2].removeprefix("tf_")).group() for name in names}
    return FAMILIES | {re.sub("v$", "", word) for word in words}


def families_in(text: str) -> list[str]:
    """Names of families in a text, also as a part of a longer name."""
    pattern = rf"(?<![a-z])(?:{'|'.join(sorted(family_names() - {'vit'}))}|vit(?![a-z]))"
    return re.findall(pattern, text.lower())


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}


def test_every_module_has_a_floor():
    assert len(ORDER) == len(set(ORDER))
    homeless = {room_of(module) for module in MODULES} - set(ORDER)
    assert not homeless, f"give {sorted(homeless)} a place in FLOORS"
    assert {"errors", "spec", "subnet"} <= {room_of(module) for module in MODULES}


def test_imports_point_down():
    assert upward_imports(TREES, MODULES) == []


def test_upward_imports_are_seen():
    code = {
        "updp.errors": "def f():\n    from updp.spec import load_spec",
        "updp.subnet": "from updp import errors, spec\nimport updp.supernet",
        "updp.spec.tree": "from ..cli import main\nfrom . import build\nimport torch",
        "updp.cli": "import updp.pipeline",
    }
    known = MODULES | {name: Path(f"{name}.py") for name in (*code, "updp.supernet", "updp.cli", "updp.pipeline")}
    wrong = upward_imports({name: ast.parse(text) for name, text in code.items()}, known)
    assert wrong == ["updp.errors -> updp.spec", "updp.subnet -> updp.supernet", "updp.spec.tree -> updp.cli"]


def test_no_circles_inside_a_package():
    edges = {
        module: {other for other in imports_of(module, TREES[module], MODULES) if room_of(other) == room_of(module)}
        for module in MODULES
        if room_of(module) != "updp"
    }
    while leaves := [module for module, others in edges.items() if not others & edges.keys() - {module}]:
        for module in leaves:
            del edges[module]
    assert edges == {}


def test_modules_without_torch():
    for module, tree in TREES.items():
        if room_of(module) in WITHOUT_TORCH:
            names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            assert not {"torch", "timm", "numpy"} & {name.split(".")[0] for name in names}, module


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import updp", ["torch", "timm", "numpy", "yaml", "jsonschema"]),
        ("import updp; updp.load_spec(updp.list_specs()[0])", ["torch", "timm", "numpy"]),
        ("import updp; updp.SubnetConfig", ["torch", "timm", "numpy", "yaml", "jsonschema"]),
    ],
)
def test_imports_are_cheap(statement, unwanted):
    code = f"{statement}\nimport sys\nprint(sorted(set({unwanted}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


def test_no_family_of_networks_is_named_in_the_package():
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".jinja", ".css", ".js", ".html")]
    assert len(files) >= len(MODULES)
    assert [(str(path), found) for path in files if (found := families_in(path.read_text(encoding="utf-8")))] == []


def test_names_of_families_are_seen():
    text = 'if "ConvNeXtV2" in name or tf_efficientnet or my_vit or MyResNet50: activity = invite + vital'
    assert families_in(text) == ["convnext", "efficientnet", "vit"]
    assert {"resnet", "deit", "convnext", "efficientnet", "mobilenet"} <= family_names()


def test_no_code_comes_from_files_or_strings():
    assert {module: found for module, tree in TREES.items() if (found := dangerous_code(tree))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "eval('1')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_dangerous_code_is_seen(code):
    assert len(dangerous_code(ast.parse(code))) == 1
    assert dangerous_code(ast.parse("model.eval(); torch.load(p, weights_only=True); re.compile('a')")) == []


def test_every_spec_is_found_by_listing():
    files = sorted(path.stem for path in ROOT.glob("specs/*.yaml"))
    assert list_specs() == files
    assert len(files) == 28
    assert [load_spec(name).name for name in files] == files


# --- sizes ---

LONGEST_FUNCTION, LONGEST_MODULE = 45, 420


def long_functions(tree: ast.AST) -> list[str]:
    """Functions with more lines than the house allows, decorators not counted."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [f.name for f in functions if f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION]


def test_functions_and_modules_are_short():
    assert {module: found for module, tree in TREES.items() if (found := long_functions(tree))} == {}
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > LONGEST_MODULE} == {}


def test_long_functions_are_seen():
    body = "    x = 1\n" * (LONGEST_FUNCTION - 1)
    text = f"def fits():\n{body}class A:\n  def too_long(self):\n{body}    x = 2\n"
    assert long_functions(ast.parse(text)) == ["too_long"]
