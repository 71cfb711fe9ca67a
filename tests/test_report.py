"""The page that shows a run: right figures, well-formed, nothing from outside, whatever the directory holds."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from fake_run import BLOCKS, CHOICES, PRUNED, STAGES, certificate, change, write_json, write_run

from updp.errors import InputError
from updp.report import charts, report, words
from updp.report.network import network
from updp.report.read import read_run

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "</title><script>alert('x')</script>\"' onload=\"alert(1)\" & <b>"
SECTIONS = ["Network", "Accuracy", "Training", "Search", "Latency", "Certificate", "Settings and device"]


class Page(HTMLParser):
    """A page taken apart; refuses tags that are not closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag, **attributes):
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]


def page_of(directory):
    path = report(directory)
    assert path == directory / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture
def full(tmp_path):
    return write_run(tmp_path / "run")


@pytest.mark.parametrize("finished", range(len(STAGES) + 1))
def test_every_state_of_a_run_has_a_page(tmp_path, finished):
    text = page_of(write_run(tmp_path / "run", STAGES[:finished]))
    page = Page(text)
    for section in SECTIONS:
        assert re.search(rf"<h2>{section}\b", text)
    assert page.text.count("not finished") >= len(STAGES) - finished
    assert len(page.all("li", **{"class": "done"})) == finished
    assert len(page.all("li", **{"class": "todo"})) == len(STAGES) - finished


def test_graphics_are_well_formed_and_described(full):
    text = page_of(full)
    graphics = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    described = [svg for svg in graphics if svg.get("role") == "img"]
    assert len(described) == len(BLOCKS) + 7 + 7 + 5 + 2 + len(BLOCKS)  # network, lines, accuracies, steps, latencies
    assert all(svg.get("aria-label") for svg in described)
    for svg in graphics:
        for element in svg.iter():
            for name in ("x", "y", "cx", "cy", "x1", "x2", "width", "height", "d"):
                assert not re.search("nan|inf|None", element.get(name, ""))


def test_the_page_needs_nothing_from_outside(full):
    text = page_of(full)
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text.partition("<pre")[0])
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "base", "form"})
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href", "xlink:href")]
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy[0]["content"].startswith("default-src 'none'")


def test_figures_are_those_of_the_files(full):
    merge = json.loads((full / "merge" / "result.json").read_text())
    change(full / "merge" / "result.json", top1=87.6543, before={**merge["before"], "macs": 519_350_000})
    text = Page(page_of(full)).text
    assert "87.65 %" in text
    assert "−10.96 points" in text  # 87.6543 - 98.6111
    assert "519.4 M" in text
    assert "8.41 ms" in text
    assert "1.62× speed-up" in text  # 8.412 / 5.207
    assert f"{len(PRUNED)} of {len(BLOCKS)} blocks pruned" in text
    assert "0.64" in text  # 1104 / 1730 block evaluations
    assert "finetune.epochs=40, blend.K=3.5" in text
    assert "Fictional Processor 9000" in text


def test_settings_change_the_schedule_shown(full):
    rows = re.findall(r"<tr>(.*?)</tr>", page_of(full))
    cells = {
        name: re.findall("<td[^>]*>(.*?)</td>", row) for row in rows for name in re.findall("<th[^>]*>(.*?)</th>", row)
    }
    assert cells["epochs"][2] == "40"
    assert cells["epochs"][0] != "40"


def test_the_network_is_drawn_in_order_with_its_choices(full):
    groups = network(read_run(full))
    assert [group.name for group in groups] == [f"stages.{stage}.blocks" for stage in range(4)]
    views = [view for group in groups for view in group.blocks]
    assert [view.name for view in views] == BLOCKS
    assert {view.name: view.choice for view in views if view.pruned} == CHOICES
    assert [view.depth for view in views if view.choice == "full"] == [(3, 1)]
    page = Page(page_of(full))
    assert len(page.all("li", **{"class": "block pruned"})) == len(PRUNED)
    assert (
        len(page.all("rect", **{"class": "gone"})) == len(PRUNED) + 1 + 1
    )  # one each, two of "full", one in the legend
    assert "norm becomes batchnorm" in page.text
    assert "merged: conv_dw + norm + mlp.fc1 + mlp.fc2" in page.all("li", **{"class": "block pruned"})[1]["title"]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["layer1.0", "layer1.1", "layer2.0"], {"layer1": ["0", "1"], "layer2": ["0"]}),
        (["blocks.0", "blocks.1"], {"blocks": ["0", "1"]}),
        (["s.0.b.0.mlp", "s.0.b.1.mlp"], {"s.0.b": ["0.mlp", "1.mlp"]}),
        (["features[8:14]", "features[14:20]"], {"features": ["[8:14]", "[14:20]"]}),
        (["stem"], {"": ["stem"]}),
    ],
)
def test_blocks_are_grouped_by_their_common_path(tmp_path, names, groups):
    run = write_run(tmp_path / "run", ())
    change(run / "run.json", blocks=[{"name": name, "structure": "block", "recipes": []} for name in names])
    found = network(read_run(run))
    assert {group.name: [view.short for view in group.blocks] for group in found} == groups


def test_a_certificate_that_fails_is_seen(full):
    page = page_of(full)
    assert "✓ holds" in page
    assert "✗" not in page
    merge = json.loads((full / "merge" / "result.json").read_text())
    merge["certificate"]["ok"] = False
    merge["certificate"]["ops"][1].update(ok=False, ring=0.31)
    write_json(full / "merge" / "result.json", merge)
    text = Page(page_of(full)).text
    assert "✗ not met" in text
    assert "3.1e-1" in text


def test_a_certificate_on_random_weights_counts_too(full):
    change(full / "merge" / "result.json", certificate_random={**certificate(), "ok": False})
    assert "✗ not met" in page_of(full)


def test_a_given_subnet_leaves_stages_out(tmp_path):
    run = write_run(tmp_path / "run")
    for stage in ("supernet", "search"):
        (run / stage / "result.json").unlink()
    change(run / "run.json", subnet=CHOICES, weights={"file": "given.safetensors", "sha256": "ab"})
    text = Page(page_of(run)).text
    assert text.count("left out: the subnet was given") == 2
    assert f"{len(PRUNED)} of {len(BLOCKS)} blocks pruned" in text
    assert "given.safetensors" in text


def test_hostile_text_stays_text(full):
    change(full / "run.json", data=HOSTILE, environment={HOSTILE: HOSTILE, "half": "\ud800"})
    merge = json.loads((full / "merge" / "result.json").read_text())
    merge["block_latency"][0]["block"] = HOSTILE
    merge["certificate"]["ops"][0]["steps"] = [HOSTILE]
    merge["latency"]["rows"][0]["name"] = HOSTILE
    write_json(full / "merge" / "result.json", merge)
    text = page_of(full)
    page = Page(text)
    assert not page.all("script")
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("alert('x')") >= 5
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


STRANGE = [None, True, "text", [], {}, [1], {"a": {"b": []}}, -1, 0, 1e-300, 1e300, float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("strange", STRANGE, ids=lambda value: repr(value)[:12])
def test_strange_values_leave_things_out(tmp_path, strange):
    run = write_run(tmp_path / "run")
    for stage in STAGES:
        data = json.loads((run / stage / "result.json").read_text())
        for entries in (value for value in data.values() if isinstance(value, list)):
            entries[0] = dict.fromkeys(entries[0], strange)
            entries[-1] = strange
        write_json(run / stage / "result.json", data)
    Page(page_of(run))
    for stage in STAGES:
        data = json.loads((run / stage / "result.json").read_text())
        write_json(run / stage / "result.json", dict.fromkeys(data, strange))
    change(run / "run.json", environment=strange, blocks=strange, data=strange, prune=strange)
    text = page_of(run)
    Page(text)
    for section in SECTIONS:
        assert f"<h2>{section}" in text


def test_the_directory_must_be_a_run(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        report(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"not a run directory: it has no run\.json"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_corrupt_files_are_named_at_once(full):
    page_of(full)
    before = (full / "report.html").read_text()
    (full / "baseline" / "result.json").write_text('{"top1": 9')
    (full / "merge" / "result.json").write_text("[]")
    (full / "supernet" / "result.json").write_bytes(b"\xff\xfe")
    (full / "finetune" / "result.json").write_text("[" * 200_000)
    (full / "search" / "subnet.json").write_text("{}")
    (full / "spec.yaml").write_text("version: [")
    with pytest.raises(InputError) as caught:
        report(full)
    named = {problem.place.file for problem in caught.value.problems}
    stages = {str(full / stage / "result.json") for stage in ("baseline", "supernet", "finetune", "merge")}
    assert named == stages | {str(full / "search" / "subnet.json"), str(full / "spec.yaml")}
    assert "baseline/result.json:1:11: not JSON" in str(caught.value)
    assert (full / "report.html").read_text() == before
    assert not list(full.glob(".*"))


def test_a_changed_spec_is_refused(full):
    with (full / "spec.yaml").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(InputError, match="the spec was changed since the run began"):
        report(full)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (95.9, 98.6, [95, 96, 97, 98, 99]),
        (0.03, 1.8, [0, 0.5, 1, 1.5, 2]),
        (98.438, 98.438, [98.4, 98.6]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    assert charts.nice_ticks(low, high) == ticks


@pytest.mark.parametrize(("low", "high"), [(0, 0), (5, 5), (98.61, 98.61), (1e-320, 1e-320), (-3, 100), (1e18, 1e18)])
def test_ticks_enclose_whatever_there_is(low, high):
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low
    assert high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    assert sorted(set(ticks)) == ticks


def test_tick_labels_tell_ticks_apart():
    for ticks in ([0, 0.25, 0.5], [98.3, 98.4, 98.5], [0, 5, 10], [0, 0.02, 0.04]):
        labels = charts.tick_labels(ticks)
        assert len(set(labels)) == len(ticks)
        assert [float(label) for label in labels] == pytest.approx(ticks, abs=0.051)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (words.quantity(519_350_000), "519.4 M"),
        (words.quantity(2_574_500_000), "2.57 G"),
        (words.quantity(31), "31"),
        (words.percent(97.777), "97.78 %"),
        (words.milliseconds(0.0512), "0.051 ms"),
        (words.milliseconds(12.34), "12.3 ms"),
        (words.scientific(3.14e-7), "3.1e-7"),
        (words.scientific(0.0), "0"),
        (words.duration(41.46), "41.5 s"),
        (words.duration(182.2), "3 min 02 s"),
        (words.duration(18_600), "5 h 10 min"),
        (words.points(98.5, 98.08), "−0.42 points"),
        (words.points(98.5, 98.5), "±0.00 points"),
        (words.relative(100, 62), "−38 %"),
        (words.speedup(8.0, 4.0), "2.00× speed-up"),
    ],
)
def test_numbers_in_words(shown, text):
    assert shown == text


def test_a_single_epoch_is_a_dot_in_the_middle():
    chart = charts.line_chart("loss", "epoch", "loss", [charts.Series("loss", "a", [(1, 0.4)])])
    assert [tick.label for tick in chart.x_ticks] == ["1"]
    assert [dot.x for dot in chart.lines[0].dots] == [(charts.LEFT + charts.RIGHT) / 2]


def test_long_histories_have_few_markers_but_all_points():
    points = [(epoch, 1 / epoch) for epoch in range(1, 451)]
    line = charts.line_chart("loss", "epoch", "loss", [charts.Series("loss", "a", points)]).lines[0]
    assert line.path.count("L") == 449
    assert len(line.dots) <= 61
    assert line.dots[-1].title == "loss, epoch 450: 0.0022222"
