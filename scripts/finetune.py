#!/usr/bin/env python
"""See hf_detrkd/commands/finetune.py, which this runs: python scripts/finetune.py --help."""

from hf_detrkd.commands.finetune import main

if __name__ == "__main__":
    main()
