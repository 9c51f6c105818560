"""``python -m vmm_fast.cli`` is ``vmm-fast``."""

import sys

from vmm_fast.cli import main

sys.exit(main())
