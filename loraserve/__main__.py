"""`python -m loraserve`, as torchrun starts it, and whoever does not know where its script lies.

torchrun --nproc-per-node 2 -m loraserve train ...
"""

from loraserve.cli.main import main

main(prog_name="loraserve")
