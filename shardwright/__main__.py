"""``python -m shardwright``: the command line."""

from shardwright.launcher.cli import main

if __name__ == "__main__":
    main()
