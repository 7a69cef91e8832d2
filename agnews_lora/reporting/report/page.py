"""The report as one HTML file: style and pictures inside it, no script, nothing that is fetched."""

import base64
from pathlib import Path
from typing import Any, Final

from agnews_lora.reporting.report.document import Document, pictures, resolved

TEMPLATES: Final = Path(__file__).with_name("templates")


def html(document: Document) -> str:
    """The page. What comes from data is escaped, whatever it holds."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    data = _with_images(resolved(document), [_data_uri(path) for path in pictures(document)])
    return environment.get_template("report.html").render(data, style=Markup(style)) + "\n"


def _with_images(data: dict[str, Any], uris: list[str]) -> dict[str, Any]:
    left = iter(uris)
    for section in data["sections"]:
        for block in section["blocks"]:
            if block["kind"] == "figure":
                block["image"] = next(left)
    return data


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
