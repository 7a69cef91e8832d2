"""From what the stores say to the document that both pages show."""

from agnews_lora.reporting.report import gallery, opening
from agnews_lora.reporting.report.comparison import against_baseline
from agnews_lora.reporting.report.counting import adapters
from agnews_lora.reporting.report.document import Document
from agnews_lora.reporting.report.dossier import Dossier
from agnews_lora.reporting.report.findings import results
from agnews_lora.reporting.report.mistakes import errors
from agnews_lora.reporting.report.reproduce import reproduce
from agnews_lora.reporting.report.setting import data, schedule
from agnews_lora.reporting.report.wording import day


def compose(dossier: Dossier) -> Document:
    """The report. A section that the stores have nothing for is left out."""
    sections = (
        data(dossier),
        adapters(dossier),
        schedule(dossier),
        results(dossier),
        gallery.search(dossier),
        against_baseline(dossier),
        errors(dossier),
        reproduce(dossier),
    )
    return Document(
        title=opening.title(dossier),
        subtitle=opening.subtitle(dossier),
        date=day(dossier.as_of),
        stamp=int(dossier.as_of.timestamp()),
        abstract=opening.abstract(dossier),
        highlights=opening.highlights(dossier),
        notice=opening.notice(dossier),
        sections=tuple(section for section in sections if section),
    )
