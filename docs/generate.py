"""Write docs/spec.md: docs/spec.md.in, with the tables that specs/schema.json and the code give.

`make docs` runs it. What a key means stands in the schema alone, and a default in the code alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from updp import conformance, kinds, subnet
from updp.certificate import BOUND
from updp.spec import STAGES, DataSettings, Recipe, Resize, Schedule, schema, specs_directory, tree
from updp.spec.build import SOURCES

HERE = Path(__file__).parent
TEMPLATE, PAGE = HERE / "spec.md.in", HERE / "spec.md"

_TYPES = {"integer": "an integer", "number": "a number", "string": "text", "object": "a mapping", "null": "null"}
_SCHEDULE = Schedule()


def code(value: object) -> str:
    """A value as one writes it in a spec."""
    if value is None:
        return "`null`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, tuple) else f"`{value}`"


def rows(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    parts = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in parts)


def cell(text: str) -> str:
    """A text without bars and, but in code, without stars that Markdown would read."""
    pieces = text.replace("|", "\\|").split("`")
    return "`".join(piece if index % 2 else piece.replace("*", "\\*") for index, piece in enumerate(pieces))


def with_names(page: str) -> str:
    """The page with each file's name above the file: what stands behind a fence is not shown."""
    seen: set[str] = set()

    def named(fence: re.Match[str]) -> str:
        name, again = fence["name"], fence["name"] in seen
        seen.add(name)
        return f"**{name}**{', the part that changes' if again else ''}:\n\n{fence[0]}"

    return re.sub(r"^```\w+ (?P<name>\S+)$", named, page, flags=re.MULTILINE)


class Schema:
    """specs/schema.json in words and tables."""

    def __init__(self) -> None:
        self.whole = schema.load_schema(specs_directory())
        self.definitions: dict[str, Any] = self.whole["$defs"]

    def name_of(self, part: Mapping[str, Any]) -> str | None:
        """The definition that a part of the schema refers to."""
        reference = part.get("$ref")
        return None if reference is None else str(reference).rpartition("/")[2]

    def value(self, part: Mapping[str, Any]) -> str:
        """What may stand there."""
        name = self.name_of(part)
        if name is not None:
            return self.reference(name)
        if "const" in part:
            return code(part["const"])
        if "enum" in part:
            return listing(part["enum"])
        if "anyOf" in part:
            return "; or ".join(self.form(form) for form in part["anyOf"])
        kinds_ = part.get("type", "string")
        first, *others = [kinds_] if isinstance(kinds_, str) else kinds_
        text = self.list_of(part) if first == "array" else self.mapping_of(part) if first == "object" else ""
        text = text or _TYPES[first] + limits(part)
        return "; or ".join([text, *(code(None) for kind in others if kind == "null")])

    def reference(self, name: str) -> str:
        """A definition by what it is, or by its name where it has a table of its own."""
        found = self.definitions[name]
        if name in ("path", "part", "match", "name", "moment", "flow", "node"):
            return f"a {name}"
        if name in ("shared", "train", "schedule", "recipe", "group"):
            return "a mapping, below"
        return self.value(found)

    def form(self, form: Mapping[str, Any]) -> str:
        """One of several forms: by its title, a written-out one as code."""
        title = str(form.get("title", ""))
        if "const" in form or title.startswith("{"):
            return f"`{title}`"
        if title == "one" or self.name_of(form) in ("kernel", "appended"):
            return self.value(form)
        return title or self.value(form)

    def list_of(self, part: Mapping[str, Any]) -> str:
        items = part["items"]
        least, most = part.get("minItems", 0), part.get("maxItems")
        number = f"{least} " if least and least == most else ""
        if "anyOf" in items:
            return f"a list: {self.value(items)}"
        one, comma, rest = self.value(items).removeprefix("a ").removeprefix("an ").partition(",")
        return f"a list of {number}{one}s{comma}{rest}"

    def mapping_of(self, part: Mapping[str, Any]) -> str:
        inner = part.get("additionalProperties")
        if not isinstance(inner, Mapping) or "propertyNames" not in part:
            return ""
        key = self.name_of(part["propertyNames"]) or "name"
        return f"a mapping: {key.replace('recipe_name', 'name')} → {self.value(inner).removeprefix('a ')}"

    def about(self, part: Mapping[str, Any]) -> str:
        """What a key means; its default has a column of its own."""
        name = self.name_of(part)
        text = str(part.get("description") or (self.definitions[name]["description"] if name else ""))
        return text.partition(" Default: ")[0]

    def table(self, part: Mapping[str, Any], defaults: Mapping[str, str]) -> str:
        """The keys of a mapping."""
        required = part.get("required", part.get("else", {}).get("required", ()))
        lines = [
            [f"`{key}`", self.value(item), "required" if key in required else defaults.get(key, "–"), self.about(item)]
            for key, item in part["properties"].items()
        ]
        return rows(["key", "value", "default", "meaning"], lines)

    def section(self, name: str) -> dict[str, Any]:
        """A mapping of the schema by its name, among the definitions or the top-level keys."""
        found: dict[str, Any] = self.definitions.get(name) or self.whole["properties"][name]
        return found

    def nodes(self) -> str:
        """What may stand in a flow."""
        lines = []
        for form in self.definitions["node"]["anyOf"]:
            title = form["title"]
            lines.append([f"`{title}`" if title.startswith("{") else title, self.about(form)])
        return rows(["form", "meaning"], lines)

    def node_keys(self) -> str:
        """The keys of the forms that are mappings."""
        lines = []
        for form in self.definitions["node"]["anyOf"]:
            for key, item in form.get("properties", {}).items():
                if "description" in item:
                    lines.append([f"`{key}`", self.value(item), self.about(item)])
        return rows(["key", "value", "meaning"], lines)

    def words(self) -> str:
        """The words that the tables use for texts."""
        names = ("name", "path", "part", "match")
        return rows(["word", "meaning"], [[name, str(self.definitions[name]["description"])] for name in names])


def listing(values: Sequence[Any]) -> str:
    """Allowed values; a long row of numbers by its ends."""
    if len(values) > 10:
        return f"{', '.join(map(code, values[:3]))}, … {code(values[-1])}"
    return ", ".join(map(code, values))


def limits(part: Mapping[str, Any]) -> str:
    """The bounds of a number, in words."""
    if {"minimum", "maximum"} <= part.keys():
        return f", {part['minimum']} to {part['maximum']}"
    words = {
        "minimum": "at least {}",
        "exclusiveMinimum": "more than {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "less than {}",
    }
    found = [text.format(part[key]) for key, text in words.items() if key in part]
    return ", " + " and ".join(found) if found else ""


# --- defaults ---------------------------------------------------------------------------------------------------------


def defaults_of(settings: object, none: str) -> dict[str, str]:
    """The defaults that a dataclass has; ``none`` is what its None means."""
    return {
        field.name: none if (value := getattr(settings, field.name)) is None else code(value)
        for field in dataclasses.fields(settings)  # type: ignore[arg-type]
        if not dataclasses.is_dataclass(getattr(settings, field.name))
    }


def recipe_defaults() -> dict[str, str]:
    """The defaults of a recipe."""
    found = {field.name: field.default for field in dataclasses.fields(Recipe)}
    return {
        key: "nothing" if value == () else code(value)
        for key, value in found.items()
        if value is not dataclasses.MISSING and value is not None
    } | dict.fromkeys(("replace", "resize"), "nothing")


def train_defaults() -> dict[str, str]:
    """Defaults of a training stage; where stages differ, each one's."""
    stages = {stage: defaults_of(getattr(_SCHEDULE, stage), "`null`: off") for stage in STAGES}
    result = {}
    for key in stages[STAGES[0]]:
        values = {stage: found[key] for stage, found in stages.items()}
        same = len(set(values.values())) == 1
        result[key] = values[STAGES[0]] if same else ", ".join(f"{stage} {value}" for stage, value in values.items())
    return result


# --- kinds ------------------------------------------------------------------------------------------------------------


def kind_table() -> str:
    """Which classes are of which kind, and what a merge does with them."""
    classes: dict[str, list[type]] = {}
    described: dict[str, kinds.Kind] = {}
    for kind, found in kinds.TABLE:
        described.setdefault(kind.name, kind)
        classes.setdefault(kind.name, []).extend(found)
    lines = []
    for name, members in classes.items():
        shown = list(dict.fromkeys(filter(None, map(class_name, members))))
        if shown:
            lines.append([name, ", ".join(f"`{text}`" for text in shown), role(described[name])])
    return rows(["kind", "classes", "in a merge"], lines)


def class_name(cls: type) -> str | None:
    """A class as one finds it; None for those that updp makes itself or that are private."""
    if cls.__module__.startswith("updp.") or cls.__name__.startswith("_"):
        return None
    room = "nn" if cls.__module__.startswith("torch.") else "timm.layers"
    return f"{room}.{cls.__name__}"


def role(kind: kinds.Kind) -> str:
    """What a merge does with modules of a kind."""
    if kind.is_operator:
        return "merges; counts in depth"
    if kind.is_diagonal:
        return "merges, or is folded into a neighbour"
    if kind.vanishes:
        return "computes nothing in eval mode"
    if kind.name == "norm_act":
        return "a batch norm and an activation: `STEP.act` names the activation for `replace`"
    return "ends a run, unless `replace` takes it away"


def render(template: str) -> str:
    """The page that a template gives."""
    language = Schema()
    environment = jinja2.Environment(
        variable_start_string="@{", variable_end_string="}@", block_start_string="@%", block_end_string="%@",
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip  # Markdown, not HTML
    names: dict[str, Any] = {
        "top": language.table(language.whole, {"include": "nothing", "data": "timm's", "schedule": "each key's"}),
        "words": language.words(),
        "model": language.table(language.section("model"), dict.fromkeys(SOURCES, "one of them")),
        "data": language.table(language.section("data"), defaults_of(DataSettings(), "timm's")),
        "nodes": language.nodes(),
        "node_keys": language.node_keys(),
        "recipe": language.table(language.section("recipe"), recipe_defaults()),
        "moments": language.value(language.section("moment")),
        "moment": code(Resize(1).at.fraction),
        "layers": language.value(language.section("layer")),
        "group": language.table(language.section("group"), {"except": "nothing"}),
        "schedule": language.table(language.section("schedule"), defaults_of(_SCHEDULE, "") | dict.fromkeys(
            ("train", *STAGES, "search", "blend", "teacher"), "each key's")),
        "train": language.table(language.section("train"), train_defaults()),
        "search": language.table(language.section("schedule")["properties"]["search"],
                                 defaults_of(_SCHEDULE.search, "")),
        "blend": language.table(language.section("schedule")["properties"]["blend"], defaults_of(_SCHEDULE.blend, "")),
        "teacher": language.table(language.section("schedule")["properties"]["teacher"],
                                  defaults_of(_SCHEDULE.teacher, "")),
        "kinds": kind_table(),
        "limits": {"kib": tree.MAX_BYTES // 1024, "depth": tree.MAX_DEPTH, "nodes": tree.MAX_NODES,
                   "digits": tree.MAX_DIGITS},
        "tolerance": f"{conformance.TOLERANCE:g}",
        "bound": f"{BOUND:g}",
        "drop_rate": conformance.DROP_RATE,
        "keep": code(subnet.KEEP),
        "refused": ", ".join(code(n) for n in language.section("model")["propertyNames"]["not"]["enum"]),
        "reserved": " and ".join(code(n) for n in language.definitions["recipe_name"]["allOf"][1]["not"]["enum"]),
    }  # fmt: skip
    return with_names(environment.from_string(template).render(names))


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(TEMPLATE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
