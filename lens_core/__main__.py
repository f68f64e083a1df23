"""`python -m lens_core` is `lens`."""

import sys

from lens_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
