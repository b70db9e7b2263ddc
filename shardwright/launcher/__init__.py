"""The command line and what starts processes; the highest room, which nothing imports.

`cli` is a thin face over the Python functions of the other rooms; `doctor` says what this machine can do.
"""
