"""`python -m dpir_jax` is the `dpir` command."""

import sys

from dpir_jax.cli import main

sys.exit(main())
