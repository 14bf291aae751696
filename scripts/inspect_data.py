#!/usr/bin/env python
"""See hf_detrkd/commands/inspect_data.py, which this runs: python scripts/inspect_data.py --help."""

from hf_detrkd.commands.inspect_data import main

if __name__ == "__main__":
    main()
