#!/usr/bin/env python
"""See hf_detrkd/commands/compare.py, which this runs: python scripts/compare.py --help."""

from hf_detrkd.commands.compare import main

if __name__ == "__main__":
    main()
