"""The papers' tables: every figure that can be computed is the published one, to the digit."""

import json
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
import torch
import yaml
from commands import Caller
from torch import nn

from updp.cli import console
from updp.errors import InputError
from updp.oracle import count_subnet
from updp.spec import load_spec
from updp.subnet import load_subnet
from updp.tables import Dialect, compare, list_tables, load_tables, measure, space

PAPERS = {"depthshrinker": 30, "eapruning": 31, "isomorphic": 10, "updp": 47}  # rows

# (paper, table, row) -> millions or thousands of millions of operations, in the paper's own way of counting.
OPERATIONS = {
    ("depthshrinker", "1", "MobileNetV2"): "0.3342",
    ("depthshrinker", "1", "MobileNetV2-1.4"): "0.6302",
    ("depthshrinker", "1", "EfficientNet-Lite0"): "0.4189",
    ("depthshrinker", "1", "ResNet-50"): "4.1449",
    ("depthshrinker", "1", "ResNet-101"): "7.8827",
    ("depthshrinker", "1", "ResNet-152"): "11.6265",
    ("depthshrinker", "2", "MBV2-1.4"): "630.15",
    ("depthshrinker", "2", "MBV2-1.4-DS-A"): "519.44",
    ("depthshrinker", "2", "MBV2-1.4-DS-B"): "502.47",
    ("depthshrinker", "2", "MBV2-1.4-DS-C"): "492.57",
    ("depthshrinker", "2", "MBV2-1.4-DS-D"): "484.25",
    ("depthshrinker", "2", "MBV2-1.4-DS-E"): "474.36",
    ("depthshrinker", "2", "MBV2-1.4-DS-F"): "415.98",
    ("depthshrinker", "2", "Uniform-0.65x"): "182.56",
    ("depthshrinker", "2", "Uniform-0.35x"): "68.02",
    ("depthshrinker", "3", "MBV2-DS-A"): "287.16",
    ("depthshrinker", "3", "MBV2-DS-B"): "272.79",
    ("depthshrinker", "3", "MBV2-DS-C"): "261.17",
    ("depthshrinker", "3", "MBV2-DS-D"): "253.78",
    ("depthshrinker", "7", "EffLite1"): "650.98",
    ("depthshrinker", "7", "EffLite2"): "924.31",
    ("depthshrinker", "7", "EffLite3-DS-A"): "991.70",
    ("depthshrinker", "7", "EffLite3-DS-B"): "952.43",
    ("depthshrinker", "7", "EffLite3-DS-C"): "918.70",
    ("depthshrinker", "7", "EffLite3-DS-D"): "905.75",
    ("eapruning", "3", "ResNet50"): "4111.41",
    ("eapruning", "4", "MobileNetV1"): "568.74",
    ("eapruning", "4", "MobileNetV1-0.75"): "325.40",
    ("updp", "2", "Ours-P6"): "519.44",
    ("updp", "2", "Ours-P9"): "492.57",
    ("updp", "2", "Ours-P11"): "474.36",
    ("updp", "3", "ConvNeXtV1-T-UPDP-P3"): "3.8125",
    ("updp", "3", "ConvNeXtV1-T-UPDP-P6"): "3.1875",
    ("updp", "3", "ConvNeXtV1-T-UPDP-P9"): "2.5745",
    ("updp", "4", "Ours-P6"): "0.9487",
}
# Millions of parameters as counted, and the norms that recipes append, which are in or out as the file says.
PARAMETERS = {
    "ConvNeXtV1-T-UPDP-P3": ("28.383", 576),
    "ConvNeXtV1-T-UPDP-P6": ("27.583", 1728),
    "ConvNeXtV1-T-UPDP-P9": ("23.651", 4416),
    "Ours-P6": ("3.822", 2304),
    "DeiT-Tiny": ("5.377", 0),
}
EXPLAINED = {("updp", "ConvNeXtV2-P"), ("eapruning", "DeiT-Base")}


@pytest.fixture(scope="module")
def found():
    return compare([load_tables(name) for name in list_tables()])


@pytest.fixture
def call(capsys):
    return Caller(capsys)


def short(value: Decimal, digits: str) -> str:
    return str(value.quantize(Decimal(digits)))


# --- figures ---


def test_every_row_of_every_paper_is_there(found):
    assert list_tables() == list(PAPERS)
    rows = Counter(name for name in PAPERS for table in load_tables(name).tables for _ in table.rows)
    assert rows == PAPERS
    assert found.counts == {"equal": 78, "differs": 2, "unexplained": 0, "not determinable": 72}
    assert found.ok


def test_operations_to_the_digit(found):
    computed = {(f.paper.name, f.table.name, f.row.name): f.computed for f in found.figures if f.figure.what == "macs"}
    assert {key: short(computed[key], digits) for key, digits in OPERATIONS.items()} == OPERATIONS


def test_products_alone_of_the_basic_blocks(found):
    products = {f.row.name: f.measured.macs for f in found.figures if (f.paper.name, f.table.name) == ("updp", "1")
                if f.measured}  # fmt: skip
    assert [round(products[row] / 1e9, 4) for row in ("Ours-P6", "Ours-P10")] == [2.9701, 2.5077]


def test_parameters_to_the_digit(found):
    params = {f.row.name: f for f in found.figures if f.figure.what == "params" and f.count is not None}
    computed = {row: (short(params[row].computed, "0.001"), params[row].measured.appended) for row in PARAMETERS}
    assert computed == PARAMETERS
    assert all(params[row].figure.dialect.appended for row in PARAMETERS)


def test_only_known_differences(found):
    assert {(f.paper.name, f.row.name) for f in found.figures if f.verdict == "differs"} == EXPLAINED
    assert all(f.reason for f in found.figures if f.verdict in ("differs", "not determinable"))


def test_the_readme_s_totals(found):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    said = r"Of (\d+) figures (\d+) are equal .*? (\d+) differ .*? (\d+) cannot be determined"
    (numbers,) = re.findall(said, " ".join(readme.split()))
    counts = found.counts
    assert [int(number) for number in numbers] == [
        len(found.figures), counts["equal"], counts["differs"], counts["not determinable"],
    ]  # fmt: skip


# Columns of the papers' tables that are figures here. A table without any of them is about something else.
COLUMNS = {
    **dict.fromkeys(("flops_G", "gflops", "macs_G"), ("macs", "G")),
    **dict.fromkeys(("flops_M", "mflops"), ("macs", "M")),
    "params_M": ("params", "M"),
}
NOT_IN_TABLES = {("eapruning", "section 3.2")}  # ours: figures of the paper's text
LEFT_OUT: set[tuple[str, str, str]] = set()  # (paper, table, row) that have a figure and no row here


def printed_figures(given):
    """Row, kind of figure and what is printed, for every figure of a table of the paper."""
    columns = [(index, *COLUMNS[name]) for index, name in enumerate(given.get("columns", ())) if name in COLUMNS]
    for row in given.get("rows", ()):
        for index, what, unit in columns:
            if row[index] is not None:
                text = str(row[index])
                number = Decimal(text.strip("~G")).normalize()
                yield row[0], what, number, "G" if text.endswith("G") else unit, text.startswith("~")


@pytest.mark.parametrize("paper", PAPERS)
def test_figures_are_those_of_the_paper(paper):
    """Against the figures that were read from the paper itself, where they are at hand: the same rows, both ways."""
    source = Path(__file__).parents[2] / "shared" / "papers" / "paper_tables.yaml"
    if not source.is_file():
        pytest.skip("the papers' figures are not here")
    read = yaml.safe_load(source.read_text(encoding="utf-8"))
    about = read.get(paper) or read[f"{paper}_supplement"]
    given = {name.removeprefix("table"): table for name, table in about["tables"].items()}
    given |= {"repository": about["repository_figures"]} if "repository_figures" in about else {}
    theirs = Counter((name, *figure) for name, table in given.items() for figure in printed_figures(table)
                     if (paper, name, figure[0]) not in LEFT_OUT)  # fmt: skip
    ours = Counter(
        (table.name.removeprefix("supplement "), row.name, figure.what, Decimal(str(figure.published)).normalize(),
         figure.dialect.unit, figure.approximate)
        for table in load_tables(paper).tables if (paper, table.name) not in NOT_IN_TABLES
        for row in table.rows for figure in row.figures if figure.published is not None
    )  # fmt: skip
    assert ours == theirs


# --- how figures are compared ---


@pytest.mark.parametrize(
    ("digits", "rounding", "count", "expected"),
    [
        ((0,), "truncate", 519_999_999, "519"),
        ((0,), "round", 650_500_000, "651"),
        ((2, 1), "round", 2_445_500_000, "2445.5"),
        ((-1,), "truncate", 339_900_000, "330"),
    ],
)
def test_printed_as_a_paper_prints(digits, rounding, count, expected):
    assert Dialect("M", digits, rounding).printed(count) == Decimal(expected)


def test_rounding_twice():
    assert Dialect("G", (2, 1)).printed(2_445_500_000) == Decimal("2.5")
    assert Dialect("G", (1,)).printed(2_445_500_000) == Decimal("2.4")


GOOD = """
version: 1
title: A paper
arxiv: "2401.00001"
venue: NOWHERE 2024
figures:
  macs: {unit: M, digits: 2, rounding: truncate}
  params: {unit: M, digits: 3}
tables:
  - table: "1"
    title: small networks
    rows:
      - row: a
        macs: 1.64
        params: 0.001
        input: 32
        network: {chain: [
          {conv: 8, kernel: 3, stride: 2}, {depthwise: 3}, {repeat: 2, chain: [{conv: 16}]}, pool, {linear: 10},
        ]}
      - {row: b, macs: 3, unknown: nobody knows}
"""
CHAIN = GOOD[GOOD.index("{chain: [") : GOOD.rindex("]}") + 2]
PRODUCTS = 16 * 16 * (3 * 9 * 8 + 8 * 9 + 8 * 16 + 16 * 16) + 16 * 10
PARAMS = (3 * 9 * 8 + 16) + (8 * 9 + 16) + (8 * 16 + 32) + (16 * 16 + 32) + (16 * 10 + 10)


@pytest.fixture
def write(tmp_path):
    def write(*changes):
        text = GOOD
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "paper.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_a_chain_counts_as_it_is_written(write):
    file = write(("macs: 1.64", f"macs: {PRODUCTS // 10000 / 100}"))
    first, second, third = compare([load_tables(file)]).figures
    assert (first.count, first.verdict) == (PRODUCTS, "equal")
    assert (second.count, second.verdict) == (PARAMS, "equal")
    assert (third.verdict, third.reason, third.computed) == ("not determinable", "nobody knows", None)


def test_what_is_charged_besides_products():
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(4 * 8 * 8))
    charged = ("batchnorm", "layernorm", "activation", "bias")
    found = measure.measured(block, 8, charged)
    assert found.macs == 3 * 4 * 64
    assert found.elements == dict.fromkeys(charged, 256)
    pooled = measure.measured(nn.Sequential(block[0], nn.AdaptiveAvgPool2d(1)), 8, ("pool", "bias"))
    assert pooled.elements == {"pool": 256, "bias": 256}
    assert all(not module._forward_hooks for module in block.modules())


ROWS = """
version: 1
title: A paper
arxiv: "2401.00001"
venue: NOWHERE 2024
figures: {macs: {unit: G, digits: 1, elements: {ELEMENTS}}}
tables: [{table: "1", title: networks, rows: [{row: a, macs: 9, network: {timm: NAME}}]}]
"""


@pytest.mark.parametrize(
    ("name", "kind"), [("hiera_tiny_224", "MaskUnitAttention"), ("maxvit_tiny_tf_224", "AttentionCl")]
)
def test_attention_that_is_not_known_is_refused_where_it_is_charged(tmp_path, call, name, kind):
    file = tmp_path / "paper.yaml"
    file.write_text(ROWS.replace("NAME", name).replace("ELEMENTS", "attention: 1"), encoding="utf-8")
    call.refuses(
        "tables",
        file,
        names=(
            str(file),
            f"a: attention is charged, and how {kind} does it is not known",
        ),
    )
    file.write_text(ROWS.replace("NAME", name).replace("ELEMENTS", "layernorm: 2"), encoding="utf-8")
    assert compare([load_tables(file)]).figures[0].count > 1e9


@pytest.mark.parametrize("name", ["ds_a", "ds_c", "ds_e"])
def test_what_the_papers_leave_out_is_what_count_repairs(found, name):
    """The merged network has a map that repairs its border; figures that leave it out are that much smaller."""
    (figure,) = (f for f in found.figures if f.paper.name == "depthshrinker"
                 and f.row.network == {"spec": "mobilenetv2_140", "subnet": name})  # fmt: skip
    counted = count_subnet(load_spec("mobilenetv2_140"), load_subnet(f"mobilenetv2_140/{name}"), bn_weight=5)
    assert counted.repair_macs == figure.measured.repair_macs > 0
    assert counted.macs + figure.measured.elements["pool"] == figure.count + counted.repair_macs
    data = figure.to_json()
    assert (data["counted"]["repair"], data["measured"]["repair_macs"]) == (False, counted.repair_macs)


def test_the_command_count_says_what_repairs_the_border(call):
    done = call("count", "mobilenetv2_140", "--subnet", "ds_c", "--bn-weight", 5)
    assert "of these 3.34 M repair the border; DepthShrinker's figures leave that out" in done.out
    assert json.loads(call("count", "mobilenetv2_140", "--subnet", "ds_c", "--json").out)["repair_macs"] == 3_344_544
    assert "repair" not in call("count", "mobilenetv2_140", "--subnet", "updp_p9").out


def test_what_a_row_counts_differently_is_said_on_the_row(found):
    for f in found.figures:
        if f.figure.what != "macs" or f.measured is None:
            continue
        text = f.to_json()["counted"]["text"]
        assert ("as trained" in text) == bool(f.measured.trained)
        assert ("border repair" in text) == bool(f.measured.repair_macs)
        norms = f.measured.appended_elements and "batchnorm" in f.figure.dialect.elements
        assert ("without appended norms" in text) == bool(norms)
    trained = {f.row.name for f in found.figures if f.measured and f.measured.trained}
    assert "MBV2-1.4-DS-D" in trained
    assert "MBV2-1.4-DS-C" not in trained


def test_blocks_count_as_trained_only_where_a_table_says_so():
    network = {"spec": "mobilenetv2_140", "subnet": "ds_d"}
    (trained, left), (merged, none) = (measure.built(network, 224, trained=way) for way in (True, False))
    assert (left, none) == (("blocks.0.0",), ())
    norms = [measure.measured(model, 224, ("batchnorm",)).elements["batchnorm"] for model in (trained, merged)]
    assert norms[0] > norms[1]


def test_genes_of_a_search_space():
    """One for each width that can be chosen: what is added is as wide, and so is a depthwise convolution."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
            self.inner, self.last, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 10)

        def forward(self, x):
            x = self.second(self.first(x))
            x = x + self.last(self.inner(x).relu())
            return self.head(x.mean((2, 3)))

    assert sorted(space.genes(Block())) == [4, 8]
    assert space.channels(Block()) == 8 + 8 + 4 + 8


def test_the_published_search_space(found):
    bits, channels = (f for f in found.figures if f.figure.what in ("bits", "channels"))
    assert (len(bits.measured.genes), bits.count, channels.count) == (37, 286, 24576)


def test_the_difference_that_is_not_explained(write, call):
    file = write(("macs: 1.64", "macs: 9"))
    done = call("tables", file)
    assert done.status == 1
    assert "1 different without a reason" in done.out
    assert json.loads(call("tables", file, "--json").out)["ok"] is False
    explained = write(("macs: 1.64", "macs: {published: 9, differs: a slip}"))
    done = call("tables", explained)
    assert (done.status, "a: a slip" in done.out) == (0, True)
    stale = write(("macs: 1.64", f"macs: {{published: {PRODUCTS // 10000 / 100}, differs: a slip}}"))
    done = call("tables", stale)
    assert (done.status, "it is said to differ (a slip), but does not" in done.out) == (1, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rounding: truncate", "rounding: up"), "rounding: got 'up', allowed: round, truncate"),
        (("title: A paper\n", ""), "the key 'title' is missing"),
        (("unknown: nobody knows", "unknow: nobody knows"), "unknown key: got 'unknow'"),
        ((", unknown: nobody knows", ""), "tables[0].rows[1]: give `network`, or `unknown`"),
        (("macs: 3, ", ""), "tables[0].rows[1]: no figure: give macs or params"),
        (("{unit: M, digits: 3}", "{digits: 3}"), "tables[0].rows[0].params: its 'unit' is given nowhere"),
        (("macs: 3,", "macs: [3],"), "macs: got a list, allowed: a number; a mapping with `published`"),
        (("{linear: 10}", "{lineal: 10}"), "did you mean 'linear'?"),
        ((CHAIN, "{timm: nosuchnet}"), "a: no such model of timm: got 'nosuchnet'"),
        (
            ("{chain: [", "{timm: resnet18, chain: ["),
            "network: got a mapping with 'timm', 'chain', allowed: a mapping with",
        ),
        ((CHAIN, "{timm: resnet18, spec: resnet34}"), "network: got a mapping with 'timm', 'spec', allowed: a mapping"),
        (
            (CHAIN, "{timm: resnet18, subnet: p6}"),
            "got 'subnet', allowed: `deployed` and arguments of timm.create_model",
        ),
        ((CHAIN, "{timm: resnet18, input: 32}"), "bad key: got 'input', allowed: `deployed` and arguments"),
        (('"2401.00001"', '"24.1"'), "arxiv: got '24.1', allowed: its number on arXiv, four digits, a point and five"),
        (("macs: 1.64", "macs: {published: null}"), "[0].macs: `published` is null: only for `unknown` networks"),
        (
            (CHAIN, "{spec: nosuch}"),
            "a: no such spec: got 'nosuch'",
        ),
        (
            (CHAIN, "{spec: resnet34, subnet: ds_z}"),
            "a: no such subnet",
        ),
        (("params: 0.001", "params: {published: 1, exclude: [head.*]}"), "exclude: no parameter matches 'head.*'"),
        (("input: 32", "input: 32\n        note: [1]"), "note: got a list, allowed: a string"),
        (("repeat: 2, chain: [{conv: 16}]", "depthwise: 3, stride: 0"), "got 0, allowed: at least 1"),
    ],
)
def test_bad_files_end_in_one_message(write, call, change, message):
    file = write(change)
    text = call.refuses("tables", file, names=(message,))
    assert str(file) in text
    assert ":" in text.partition(str(file))[2][:4]


def test_the_same_table_twice(write):
    twice = "  - {table: '1', title: again, rows: [{row: c, macs: 1, unknown: why}]}\n"
    with pytest.raises(InputError, match=r"tables\[1\].table: '1' is there already"):
        load_tables(write(("      - {row: b, macs: 3, unknown: nobody knows}\n",
                           "      - {row: b, macs: 3, unknown: nobody knows}\n" + twice)))  # fmt: skip


# --- the command ---


def test_the_command_shows_published_beside_computed(call):
    done = call("tables", "depthshrinker", "--table", "3")
    assert done.status == 0
    line = next(line for line in done.out.splitlines() if "MBV2-DS-B" in line)
    assert line.split()[:7] == ["MBV2-DS-B", "macs", "272", "M", "272.79", "M", "224"]
    assert " ".join(line.split()).endswith("MAC + 5 BN + pool, without border repair, truncated equal")
    first = next(line for line in done.out.splitlines() if "MBV2-DS-A" in line)
    assert first.endswith("MAC + 5 BN + pool, blocks.0.0 as trained, without border repair, truncated  equal")
    assert "not determinable: AMC (220 M): widths not published" in done.out
    assert "5 equal, 1 not determinable" in done.out
    assert done.err == ""


def test_the_command_fits_into_a_hundred_columns(call, monkeypatch):
    monkeypatch.setattr(console.out, "_width", 100)
    lines = call("tables", "updp", "--table", "4").out.splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.rstrip().endswith(" equal") for line in lines) == 4


def test_the_command_s_json_holds_everything(call):
    data = json.loads(call("tables", "updp", "--table", "4", "--json").out)
    assert (data["ok"], data["counts"]["unexplained"]) == (True, 0)
    (paper,) = data["papers"]
    assert (paper["paper"], paper["arxiv"], paper["tables"][0]["table"]) == ("updp", "2401.06426", "4")
    row = next(row for row in paper["tables"][0]["rows"] if row["row"] == "Ours-P6")
    macs, params = row["figures"]
    assert row["network"] == {"spec": "deit_tiny_patch16_224", "subnet": "updp_p6"}
    assert (macs["published"], macs["unit"], macs["verdict"], macs["count"]) == (0.9, "G", "equal", 948_670_464)
    assert params["counted"]["exclude"] == ["head.*", "patch_embed.*"]
    assert params["measured"] == {"all": 4_162_216, "appended": 2304}
    missing = next(row for row in paper["tables"][0]["rows"] if row["row"] == "XPruner")
    assert missing["figures"][0]["computed"] is None
    assert missing["figures"][0]["reason"]


def test_wrong_papers_and_tables(call):
    call.refuses("tables", "updb", names=("no such tables", "did you mean 'updp'"))
    call.refuses("tables", "updp", "--table", "9", names=("no such table: got '9', allowed: 1, 2, 3, 4",))
    call.refuses("tables", "--table", "1", names=("--table: say of which paper",))
    call.refuses("tables", "nosuch.yaml", names=("nosuch.yaml: cannot read", "No such file"))


def test_nothing_is_computed_or_downloaded():
    row = load_tables("depthshrinker").tables[1].rows[2]
    model, _ = measure.built(row.network, row.size)
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}
    measure._supernet.cache_clear()
    supernet = measure._supernet("mobilenetv2_140", 224)
    assert {parameter.device for parameter in supernet.parameters()} == {torch.device("meta")}
