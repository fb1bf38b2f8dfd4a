"""Pure tensor functions: boxes, sampling, incoherence, quadtree, position and paste.

Nothing here holds state or weights. Import the module that you need, for instance
``from transfiner_refine.functional.incoherence import incoherence_map``.
"""
