"""Entry point for `python launch.py` and `ray job submit -- python launch.py`; the same as `harma-ray`."""

import sys

from harma_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
