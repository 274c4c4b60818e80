"""Every figure of docs/data.md: `python -m benchmarks.data CHECKPOINT`, five minutes on two cores."""

from __future__ import annotations

import argparse
import sys

from benchmarks import collation, data_build, packing


def main() -> None:
    """One table after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="whose tokenizer and picture settings count")
    given = parser.parse_args()
    for name, run in (
        ("How full rows are", lambda: packing.main([])),
        ("Building prepared data", lambda: data_build.main([given.checkpoint])),
        ("Batches of stage 3", lambda: collation.main([given.checkpoint])),
    ):
        sys.stdout.write(f"\n{name}\n")
        run()


if __name__ == "__main__":
    main()
