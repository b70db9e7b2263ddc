"""``python -m shardwright``: the command line."""

from shardwright.launcher.early import leaving_at_once

if __name__ == "__main__":
    with leaving_at_once():
        from shardwright.launcher.cli import main
    main()
