"""`python -m agnews_lora` is the command line."""

import sys

from agnews_lora.cli import main

sys.exit(main())
