#!/usr/bin/env python
"""See hf_detrkd/commands/benchmark.py, which this runs: python scripts/benchmark.py --help."""

from hf_detrkd.commands.benchmark import main

if __name__ == "__main__":
    main()
