"""COCO annotations and results files, read and written, and the datasets built on them."""
