"""``python -m apbm_core.study.ablation``: the command line of :mod:`apbm_core.study.ablation.design`."""

import sys

from apbm_core.study.ablation.design import main

sys.exit(main())
