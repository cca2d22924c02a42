"""`python -m loraserve`, as torchrun starts it: `torchrun --nproc-per-node 2 -m loraserve train ...`."""

from loraserve.cli.main import main

main(prog_name="loraserve")
