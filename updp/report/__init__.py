"""One self-contained page that shows a run, finished or not."""

from __future__ import annotations

import functools
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from updp.files import write_text
from updp.report import calibration, charts, figures, network, views
from updp.report.read import Run, read_run

_HERE = Path(__file__).parent


def report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from what the finished stages left there, and return its path.

    The page needs no network and no script; it is there completely or not at all.

    Raises:
        InputError: if ``run_dir`` is not a run directory, a file in it is corrupt, or the page cannot be written.
    """
    page = render(read_run(Path(run_dir)))
    target = Path(run_dir) / "report.html"
    write_text(target, page.encode("utf-8", "replace").decode("utf-8"))  # JSON can hold half characters
    return target


def render(run: Run) -> str:
    """The page as text. Everything that came from the run's files is escaped by the template engine."""
    style = Markup((_HERE / "page.css").read_text(encoding="utf-8"))  # our own file: not to be escaped
    return (
        _engine()
        .get_template("page.html.jinja")
        .render(
            style=style, run=run, charts=charts, figures=figures, network=network, views=views, calibration=calibration
        )
    )


@functools.cache
def _engine() -> Environment:
    """The template engine, which reads and compiles the page once."""
    return Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
