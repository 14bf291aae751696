#!/usr/bin/env python
"""See hf_detrkd/commands/summarize.py, which this runs: python scripts/summarize.py --help."""

from hf_detrkd.commands.summarize import main

if __name__ == "__main__":
    main()
