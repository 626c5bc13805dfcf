"""``python -m apbm_core.study.pages``: the command line of :mod:`apbm_core.study.pages.runner`."""

import sys

from apbm_core.study.pages.runner import main

sys.exit(main())
