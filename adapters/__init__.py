"""Adapters that refine the masks of a host framework's detector.

One module per host framework. Importing this package imports no framework; importing a module imports its own only.
"""
