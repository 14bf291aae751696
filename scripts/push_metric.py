#!/usr/bin/env python
"""See hf_detrkd/commands/push_metric.py, which this runs: python scripts/push_metric.py --help."""

from hf_detrkd.commands.push_metric import main

if __name__ == "__main__":
    main()
