"""The page of ``transfiner-refine serve`` as a Hugging Face Space: ``python app.py``."""

from transfiner_refine import Refiner
from transfiner_refine.web.server import serve_page

serve_page(Refiner.from_pretrained(), host="0.0.0.0", port=7860)  # what a Space expects
