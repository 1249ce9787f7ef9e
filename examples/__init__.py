"""Programs that show Burnish at work, run from a checkout: `python -m examples.train_nanogpt --help`."""
