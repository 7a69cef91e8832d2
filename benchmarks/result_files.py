"""Result files: how they name the code and the device that they were measured with."""

import datetime
import re
from collections.abc import Mapping

from benchmarks import RESULTS


def commit_of(tags: Mapping[str, str]) -> str:
    """Name the commit, `0123456789ab (dirty)`. tags: the provenance of a run."""
    dirty = " (dirty)" if tags.get("git.dirty") == "true" else ""
    return f"{tags.get('mlflow.source.git.commit', 'unknown')[:12]}{dirty}"


def slug(device: str) -> str:
    """Name a device in a file's name: `CPU AVX512, 2 threads` is `cpu-avx512-2-threads`."""
    return "-".join(re.findall(r"[a-z0-9]+", device.lower()))


def write(name: str, text: str) -> None:
    """Write today's file of a measurement to `results/`, and print it. name: without the date."""
    (RESULTS / f"{name}-{datetime.date.today()}.md").write_text(text, encoding="utf-8")
    print(text)
