"""The commands that bring more than options with them, one module each; :mod:`transfiner_refine.cli` lists them."""
