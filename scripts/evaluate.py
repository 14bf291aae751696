#!/usr/bin/env python
"""See hf_detrkd/commands/evaluate.py, which this runs: python scripts/evaluate.py --help."""

from hf_detrkd.commands.evaluate import main

if __name__ == "__main__":
    main()
