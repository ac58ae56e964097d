"""``python -m meduet_fast`` is the program ``meduet-fast``."""

import sys

from meduet_fast.cli import main

sys.exit(main())
