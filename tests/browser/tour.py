"""The way through MLflow's UI that shows a sweep, with a photograph at each stop.

`python -m tests.browser.tour PROJECT FOLDER` takes it through a project whose sweep `embedded` is finished and
promoted, and leaves the pictures in a folder. Those in `docs/images` were made so.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from urllib.parse import urljoin

from playwright.sync_api import Page, expect

from tests.browser.mlflow_ui import Visitor, served, visiting

ZOOM: Final = 1.2  # so that a picture can be read at the width of a README


@dataclass(frozen=True)
class Tour:
    """visitor: who goes. printed: what `agnews-lora ui` printed. study: whose parent run is the first stop."""

    visitor: Visitor
    printed: str
    study: str

    def address(self, page: str) -> str:
        """Address of one of the study's pages, as the command printed it."""
        found = re.search(rf"^{re.escape(self.study)}, {page}: (http://\S+)$", self.printed, re.MULTILINE)
        assert found, self.printed
        return found[1]

    def parent(self) -> Page:
        """The parent run: the story's first lines, metrics, children, tags."""
        return self.visitor.open(self.address("sweep"), shows=["Budget:", "best/accuracy"])

    def trials(self) -> Page:
        """The study's view: its trials as a table."""
        return self.visitor.open(self.address("trials"), shows=["lora_r"])

    def charts(self) -> Page:
        """The study's view: its trials as charts."""
        return self.visitor.open(self.address("charts"), shows=["Parallel Coordinates", "vs. eval/accuracy"])

    def story(self) -> Page:
        """The parent run with its whole description."""
        page = self.parent()
        page.get_by_text("Show more", exact=True).first.click()
        expect(page.get_by_role("heading", name="What to do next")).to_be_visible()
        return page

    def follow(self, page: Page, label: str | re.Pattern[str], shows: list[str]) -> Page:
        """Where the first link of that label leads to."""
        link = page.get_by_role("link", name=label).first.get_attribute("href")
        assert link is not None
        return self.visitor.open(urljoin(page.url, link), shows)

    def winner(self, story: Page) -> Page:
        """The winner's run with its whole description."""
        page = self.follow(story, re.compile(r"^t\d+-"), ["Winner of"])
        page.get_by_text("Show more", exact=True).first.click()
        return page

    def model(self, version: Page) -> Page:
        """The registered model of a version."""
        return self.visitor.open(re.sub(r"/versions/\d+", "", version.url), ["Versions"])


def stops(tour: Tour) -> Iterator[tuple[str, Page]]:
    """Every stop's name and page, in order."""
    yield "parent", tour.parent()
    story = tour.story()
    yield "story", story
    yield "trials", tour.trials()
    yield "charts", tour.charts()
    yield "winner", tour.winner(story)
    yield "leaderboard", tour.follow(story, "leaderboard", ["View as table"])
    version = tour.follow(story, re.compile(r"^version \d+ of "), ["validation split", "Passed the promotion checks"])
    yield "version", version
    yield "model", tour.model(version)
    yield "logged model", tour.follow(tour.winner(story), "classifier", ["Datasets used"])


def main() -> int:
    project, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with (
        TemporaryDirectory() as logs,
        served(project, Path(logs, "ui.log")) as printed,
        visiting(folder, ZOOM) as visitor,
    ):
        for name, page in stops(Tour(visitor, printed, "embedded")):
            print(visitor.photograph(page, name))
    return 1 if visitor.strangers or visitor.faults else 0


if __name__ == "__main__":
    sys.exit(main())
