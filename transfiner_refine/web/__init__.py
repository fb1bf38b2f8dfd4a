"""The page of ``transfiner-refine serve``: a photo and a coarse mask in, a refined mask and what led to it out."""
