"""`python -m loramux_trainer`, the same as `loramux-train`."""

from loramux_trainer.cli import main

main()
