#!/usr/bin/env python
"""See hf_detrkd/commands/predict.py, which this runs: python scripts/predict.py --help."""

from hf_detrkd.commands.predict import main

if __name__ == "__main__":
    main()
