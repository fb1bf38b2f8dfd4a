"""The page: its layout and its texts. Importing it needs Gradio."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio import themes
from PIL import Image

from transfiner_refine.web.handlers import BOX, DRAW, FILES, Handlers
from transfiner_refine.web.uploads import SUFFIXES

HEAD = """
# Crisp masks from coarse ones
Give a photo and a rough mask of an object. The refiner finds the few cells of its outline that low resolution got
wrong, holds them in a quadtree, and corrects them with a transformer: *Mask Transfiner*, CVPR 2022. Photos stay on the
machine that runs this page.
"""

START = """
### Nothing refined yet
Take an example, or a photo of your own with a rough mask of an object, and press **Refine**.
"""

BOX_HELP = """
Tap two opposite corners in the photo, or enter pixels. GrabCut then guesses the coarse mask: the refiner corrects
outlines, it does not find objects.
"""

CSS = """
.gradio-container { max-width: 1360px !important; margin: 0 auto !important; }
#preview img, #look img { cursor: crosshair; }
#examples .grid-wrap { min-height: 0; }
#preview img { max-height: 440px; object-fit: contain; }
#look img, #closeup img, #incoherence img, #quadtree img { max-height: 680px; object-fit: contain; }
"""

STROKE = "#56b4e9"
OPACITY = 0.55

STATE_SECONDS = 3600
"""How long a visitor's last refinement is kept, in memory and as files."""

THEME = themes.Default(
    primary_hue=themes.colors.sky,
    # Fonts of the visitor's system: none are fetched.
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


def build(handlers: Handlers) -> gr.Blocks:
    """Lay out the page and connect its handlers."""
    config = handlers.refiner.config
    with gr.Blocks(title="transfiner-refine", analytics_enabled=False, delete_cache=(600, STATE_SECONDS)) as page:
        gr.Markdown(HEAD)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                gr.Markdown("**Examples:** photos with the masks of a detector")
                gallery = gr.Gallery(
                    [(Image.open(example.photo), example.title) for example in handlers.examples],
                    show_label=False,
                    columns=len(handlers.examples),
                    height="auto",
                    allow_preview=False,
                    object_fit="cover",
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
                photo = gr.File(label="1. Photo", file_types=list(SUFFIXES), height=120, elem_id="photo")
                source = gr.Radio([DRAW, BOX, FILES], value=DRAW, label="2. Coarse mask", elem_id="source")
                with gr.Column(visible=False) as drawing:
                    board = gr.ImageEditor(
                        label="Paint over the object, or draw a line around it",
                        sources=(),
                        transforms=(),
                        layers=False,
                        brush=gr.Brush(default_size=14, colors=[(STROKE, OPACITY)], color_mode="fixed"),
                        buttons=[],
                        height=440,
                        placeholder="The photo appears here",
                        elem_id="board",
                    )
                with gr.Column(visible=False) as boxing:
                    gr.Markdown(BOX_HELP)
                    with gr.Row(elem_id="box"):
                        box = [
                            gr.Number(label=side, value=None, precision=0, min_width=70)
                            for side in ("Left", "Top", "Right", "Bottom")
                        ]
                with gr.Column(visible=False) as uploading:
                    files = gr.File(
                        label="Mask images, or COCO results",
                        file_count="multiple",
                        file_types=[*SUFFIXES, ".json"],
                        height=120,
                        elem_id="masks",
                    )
                preview = gr.Image(visible=False, interactive=False, buttons=[], elem_id="preview")
                with gr.Accordion("Options", open=False):
                    levels = gr.Slider(1, config.depth, value=config.depth, step=1, label="Quadtree levels")
                    threshold = gr.Slider(
                        0.05, 0.95, value=0.5, step=0.05, label="Incoherence threshold: lower refines more cells"
                    )
                    accept_all = gr.Checkbox(False, label="Accept every refinement, also one that promises little")
                button = gr.Button("Refine", variant="primary", size="lg", elem_id="refine")
            with gr.Column(scale=7, min_width=320):
                start = gr.Markdown(START)
                with gr.Column(visible=False) as results:
                    status = gr.Markdown(elem_id="status")
                    with gr.Tabs():
                        with gr.Tab("Before and after"):
                            slider = gr.ImageSlider(
                                label="Coarse | refined", max_height=640, buttons=["fullscreen"], elem_id="slider"
                            )
                        with gr.Tab("Close-up"):
                            gr.Markdown("Where the two masks differ most.")
                            closeup = _picture("Close-up", "closeup")
                        with gr.Tab("Incoherence"):
                            gr.Markdown("Where the detector expects a mask of 28 × 28 cells to lose the label.")
                            incoherence = _picture("Incoherence map", "incoherence")
                        with gr.Tab("Quadtree"):
                            gr.Markdown("The cells that were corrected. Only incoherent ones are split further.")
                            quadtree = _picture("Quadtree by level", "quadtree")
                        with gr.Tab("Attention"):
                            line = gr.Markdown(elem_id="look-line")
                            looked = _picture("Attention of a node", "look", buttons=[])
                            layer = gr.Radio(
                                [(str(index + 1), index) for index in range(config.layers)],
                                value=config.layers - 1,
                                label="Layer of the sequence encoder",
                            )
                    with gr.Row():
                        mask_file = gr.DownloadButton("Refined mask (PNG)", elem_id="download-png")
                        json_file = gr.DownloadButton("COCO results (JSON)", elem_id="download-json")

        last = gr.State(None, time_to_live=STATE_SECONDS)
        point = gr.State(None)
        given = [photo, source, files, *box]
        quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        # One refinement at a time, and never one while the layers of the model are watched.
        model: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "model"}

        gallery.select(handlers.take_example, None, [photo, source, files], **quick)
        arrange: dict[str, Any] = dict(fn=handlers.arrange, inputs=[photo, source], **quick)
        arrange["outputs"] = [drawing, boxing, uploading]
        # What comes while an event is at work is not lost: its last one follows.
        last_counts: dict[str, Any] = quick | {"trigger_mode": "always_last"}
        show: dict[str, Any] = dict(fn=handlers.preview, inputs=given, outputs=preview, **last_counts)
        photo.change(handlers.take_photo, photo, [photo, board, *box], **quick).then(**arrange).then(**show)
        source.change(**arrange).then(**show)
        gr.on([files.change, *(side.input for side in box)], **show)
        preview.select(handlers.take_corner, [photo, source, *box[:3]], box, **last_counts).then(**show)
        button.click(
            handlers.refine,
            [*given, board, levels, threshold, accept_all],
            [
                *(last, point, start, results, status),
                *(slider, closeup, incoherence, quadtree, looked, line),
                *(mask_file, json_file),
            ],
            show_progress_on=[button, slider],
            scroll_to_output=True,
            **model,
        )
        looked.select(handlers.take_point, None, point, **quick).then(
            handlers.look, [last, point, layer], [looked, line], **model
        )
        layer.input(handlers.look, [last, point, layer], [looked, line], **model)
    return page.queue(max_size=32, default_concurrency_limit=4)


def _picture(label: str, name: str, buttons: tuple[str, ...] | list[str] = ("fullscreen",)) -> gr.Image:
    """A picture with its own captions, which a label would cover."""
    return gr.Image(label=label, show_label=False, interactive=False, buttons=list(buttons), elem_id=name)  # type: ignore[arg-type]
