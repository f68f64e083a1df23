"""How good each stage of a curation is, on a dirty web that we make. docs/dirty-web.md has the figures.

    python scripts/dirty_web.py make dirty-web --pictures 6000 --seed 1
    lens data curate examples/curation/dirty-web.yaml --output runs/dirty-web
    python scripts/dirty_web.py score dirty-web runs/dirty-web

`score` compares the verdicts with the truth, prints a table, and writes `stages.json` beside the store's report.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lens_shapes.dirty_web import read_truth, write
from lens_shapes.dirty_web_scores import figures, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make")
    make.add_argument("folder", type=Path)
    make.add_argument("--pictures", type=int, default=6000)
    make.add_argument("--share", type=float, default=0.5, help="share that is spoiled; 0: a clean web")
    make.add_argument("--seed", type=int, default=0)
    score = commands.add_parser("score")
    score.add_argument("folder", type=Path)
    score.add_argument("store")
    score.add_argument("--output", type=Path, help="the file, if not STORE/stages.json")
    options = parser.parse_args()
    if options.command == "make":
        made = write(options.folder, options.pictures, options.share, options.seed)
        print(f"{options.folder}: {len(made):,} pictures, {sum(bool(t.damage) for t in made):,} of them spoiled")
        return
    from lens_curate.verdicts import verdicts

    scores = figures(read_truth(options.folder), list(verdicts(options.store)))
    (options.output or Path(options.store) / "stages.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(table(scores))


if __name__ == "__main__":
    main()
