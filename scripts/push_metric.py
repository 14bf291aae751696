#!/usr/bin/env python
"""Push the COCO metric to the Hub as an `evaluate` Space: python scripts/push_metric.py USER/coco_detection."""

import argparse

from hf_detrkd.publishing import push_metric

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo_id", help="USER/coco_detection or ORGANISATION/coco_detection")
    parser.add_argument("--private", action="store_true", help="make a Space that only you see")
    arguments = parser.parse_args()
    print(push_metric(arguments.repo_id, private=arguments.private or None).commit_url)
