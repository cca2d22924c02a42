"""`python -m loraserve.cli`, for processes that start loraserve without knowing where its script lies."""

from loraserve.cli.main import main

main(prog_name="loraserve")
