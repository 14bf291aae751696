"""The command line: `scripts/*.py` and `python -m hf_detrkd.commands.*` run these."""
