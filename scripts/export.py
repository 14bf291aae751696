#!/usr/bin/env python
"""See hf_detrkd/commands/export.py, which this runs: python scripts/export.py --help."""

from hf_detrkd.commands.export import main

if __name__ == "__main__":
    main()
