"""Push the COCO metric to the Hub as an `evaluate` Space.

python scripts/push_metric.py USER/coco_detection
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..publishing import push_metric


def main(argv: Sequence[str] | None = None) -> str:
    """The command. Prints and returns the address of the commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", help="USER/coco_detection or ORGANISATION/coco_detection")
    parser.add_argument("--private", action="store_true", help="make a Space that only you see")
    parser.add_argument("--token", help="Hub token; by default the one you logged in with")
    arguments = parser.parse_args(argv)
    url = push_metric(arguments.repo_id, token=arguments.token, private=arguments.private or None).commit_url
    print(url)
    return url


if __name__ == "__main__":
    main()
