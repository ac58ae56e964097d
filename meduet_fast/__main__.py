"""``python -m meduet_fast`` is the program ``meduet-fast``."""

import sys

from .cli import main

sys.exit(main())
