"""Check that Lens is right and fast on a GPU, and write what was measured: `gpu_check.py --minutes 8 --output OUT`.

The same as `lens doctor --check`; works from a clone without installing it. `--device cpu --small` rehearses it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins")]

from lens_core.cli.main import main  # noqa: E402  # the path comes first

if __name__ == "__main__":
    sys.exit(main(["doctor", "--check", *sys.argv[1:]]))
