"""``python -m nearshard``: the command."""

from nearshard.cli import main

if __name__ == "__main__":
    main()
