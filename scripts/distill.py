#!/usr/bin/env python
"""See hf_detrkd/commands/distill.py, which this runs: python scripts/distill.py --help."""

from hf_detrkd.commands.distill import main

if __name__ == "__main__":
    main()
