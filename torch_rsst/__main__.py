"""``python -m torch_rsst``: the same as ``torch-rsst``."""

import sys

from torch_rsst.cli.main import main

sys.exit(main())
