"""Configs that ship with the project: complete runs, `debug/` runs for a CPU, and `hardware/` files.

This file is here because setup.py installs the folder as the package `shardwright.configs`, beside the
other rooms, so that an install away from the checkout finds every config by name. It holds data, no code.
"""
