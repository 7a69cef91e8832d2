"""The report as a PDF, set by Typst from the template beside this module.

The text reaches the template as JSON, and is shown as strings: it cannot be markup. The fonts are those that the
compiler carries, so that the pages are the same everywhere.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from agnews_lora.reporting.report.document import Document, pictures, resolved
from agnews_lora.reporting.report.page import TEMPLATES


def pdf(document: Document) -> bytes:
    """The file. The same document gives the same bytes."""
    import typst

    with TemporaryDirectory() as folder:
        root = Path(folder)
        main = Path(shutil.copy(TEMPLATES / "report.typ", root))
        (root / "report.json").write_text(json.dumps(resolved(document)), encoding="utf-8")
        for number, path in enumerate(pictures(document)):
            shutil.copy(path, root / f"figure-{number}.png")
        compiler = typst.Compiler(input=main, root=root, ignore_system_fonts=True)
        written = compiler.compile(format="pdf", timestamp=document.stamp)
    assert isinstance(written, bytes)
    return written
