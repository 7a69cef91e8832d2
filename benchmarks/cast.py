"""The picture of the README: the screen of a real sweep half-way, as SVG.

    python -m benchmarks.cast

It runs `agnews-lora sweep embedded` in a terminal of tmux and in a folder of its own, takes the screen once half of the
trials have ended and one was pruned, writes docs/images/sweep.svg and stops the sweep. It needs tmux.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from rich.console import Console
from rich.text import Text

from benchmarks import ROOT

PICTURE: Final = ROOT / "docs" / "images" / "sweep.svg"
COMMAND: Final = "agnews-lora sweep embedded"
WIDTH: Final = 100
HEIGHT: Final = 30
COUNTS: Final = re.compile(r"trials (\d+)/(\d+): \d+ complete, (\d+) pruned")
BEGUN: Final = re.compile(r" [1-9]\d*/\d+ ")  # steps of a trial in training
FONTS: Final = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def main() -> None:
    """Run the sweep, and write the picture."""
    with TemporaryDirectory() as folder:
        for part in ("experiments", "sweeps"):
            shutil.copytree(ROOT / part, Path(folder, part))
        program = shlex.join(["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", *COMMAND.replace("-", "_", 1).split()])
        line = f"printf '$ {COMMAND}\\n'; exec {program}"
        tmux("new-session", "-d", "-x", str(WIDTH), "-y", str(HEIGHT), "-c", folder, line)
        try:
            while not is_half_way(screen := tmux("capture-pane", "-e", "-p")):
                time.sleep(0.5)
        finally:
            tmux("send-keys", "C-c")
            while "cast" in tmux("list-sessions", "-F", "cast"):
                time.sleep(0.5)
    PICTURE.write_text(drawn(screen), encoding="utf-8")
    print(f"written: {PICTURE.relative_to(ROOT)}")


def tmux(*words: str) -> str:
    """What a command of tmux prints, on a server of its own; nothing once the server has ended."""
    return subprocess.run(["tmux", "-L", "cast", *words], capture_output=True, text=True, check=False).stdout


def is_half_way(screen: str) -> bool:
    """Whether half of the trials have ended, one was pruned, and two that run have begun.

    Raises:
        RuntimeError: the sweep has ended.
    """
    if not screen:
        raise RuntimeError("the sweep ended before half of its trials had")
    plain = Text.from_ansi(screen).plain
    if (counts := COUNTS.search(plain)) is None:
        return False
    ended, total, pruned = map(int, counts.groups())
    return ended >= total / 2 and pruned > 0 and len(BEGUN.findall(plain)) >= 2


def drawn(screen: str) -> str:
    """A captured screen as SVG, without fonts from elsewhere: no page that shows it may load them."""
    console = Console(file=StringIO(), record=True, width=WIDTH, force_terminal=True)
    console.print(Text.from_ansi(screen.rstrip()), soft_wrap=True)
    svg = console.export_svg(title=COMMAND, unique_id="sweep")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"font-family: Fira Code, monospace", f"font-family: {FONTS}", svg)


if __name__ == "__main__":
    main()
