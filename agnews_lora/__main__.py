"""`python -m agnews_lora` is the command line."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working folder: a user's script there may have the name of a library

from agnews_lora.cli import main

sys.exit(main())
