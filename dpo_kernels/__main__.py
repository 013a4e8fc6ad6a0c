"""`python -m dpo_kernels`, which `accelerate launch -m dpo_kernels train CONFIG` starts in several processes."""

import sys

from dpo_kernels.cli import main

sys.exit(main())
