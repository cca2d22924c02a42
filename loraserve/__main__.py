"""`python -m loraserve` is the command `loraserve`."""

from loraserve.cli.main import main

if __name__ == "__main__":
    main()
