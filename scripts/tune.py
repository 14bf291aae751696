#!/usr/bin/env python
"""See hf_detrkd/commands/tune.py, which this runs: python scripts/tune.py --help."""

from hf_detrkd.commands.tune import main

if __name__ == "__main__":
    main()
