#!/usr/bin/env python
"""See hf_detrkd/commands/compare_models.py, which this runs: python scripts/compare_models.py --help."""

from hf_detrkd.commands.compare_models import main

if __name__ == "__main__":
    main()
