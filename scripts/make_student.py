#!/usr/bin/env python
"""See hf_detrkd/commands/make_student.py, which this runs: python scripts/make_student.py --help."""

from hf_detrkd.commands.make_student import main

if __name__ == "__main__":
    main()
