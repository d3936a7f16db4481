"""
A web page to ask a model about images: answers with scores (or the box), kept patches and scores of each selection
layer, tokens and milliseconds, beside the same weights at keep rate 1.0. Needs the extra `app`.

    python examples/app.py                                   # the model that comes with the project
    python examples/app.py --model outputs/grounding         # any checkpoint for questions, captions or boxes
"""

import trips_examples  # noqa: F401  # isort: skip

import os


# Read when these libraries are imported. Without them, a start of the page is reported to their makers.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from modeling_trips.untrusted_images import IsolatedDecoder
from trips_examples.analysis import SAME_WEIGHTS_NOTE
from trips_examples.analysis.asking import Asker
from trips_examples.analysis.page import render_look
from trips_examples.ask import CHECKPOINT, SCENE
from trips_examples.training.parser import make_parser, run_script


MAX_TEXTS, MAX_LENGTH = 6, 300
MIN_RATE = 0.05
GUIDANCES = ["text", "image", "random"]
TITLES = {
    "TripsForQuestionAnswering": (
        "Questions, one per line",
        "what color is the circle?\nwhat shape is the red shape?",
    ),
    "TripsForConditionalGeneration": ("How the caption begins", "a picture of"),
    "TripsForVisualGrounding": ("What to find, one per line", "the red circle"),
}
EXAMPLES = [  # questions about the scene
    "what color is the circle?\nwhat color is the triangle?",
    "what shape is the red shape?\nwhat shape is the gray shape?",
    "is there a blue rectangle?\nis there a blue circle?",
]
CSS = """
.results { display: flex; flex-wrap: wrap; gap: 1rem; }
.results section { flex: 1 1 16rem; min-width: 0; padding: .75rem; border-radius: 8px; }
.results section { border: 1px solid var(--border-color-primary); }
.results figure { display: inline-block; margin: 0 .5rem .5rem 0; width: 45%; vertical-align: top; }
.results figure img { width: 100%; max-height: 24rem; object-fit: contain; }
.results figcaption { font-size: .8rem; }
.results h3 { overflow-wrap: anywhere; }
#examples thead { display: none; }
#examples tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
#examples tr { display: flex; align-items: center; }
#examples td { white-space: pre-line; text-align: left; }
"""


@dataclass
class AppArguments:
    model: str = field(
        default=os.environ.get("TRIPS_MODEL", str(CHECKPOINT)),
        metadata={"help": "A checkpoint: folder, or name on the Hub. On a Space: the variable TRIPS_MODEL."},
    )
    max_megabytes: int = field(default=10, metadata={"help": "Largest file that can be uploaded."})
    host: str | None = field(
        default=None, metadata={"help": "Address to listen on. Default: GRADIO_SERVER_NAME, or else 127.0.0.1."}
    )
    port: int | None = field(default=None, metadata={"help": "Default: the first free one from 7860."})


# The functions below raise a `ValueError` with a message for visitors where the input cannot be used.


def read_upload(path: str | None, decoder: IsolatedDecoder, max_megabytes: int) -> PIL.Image.Image:
    """Return the uploaded image, upright and RGB."""
    if path is None:
        raise ValueError("There is no image yet. Upload one, or click an example.")
    if Path(path).stat().st_size > max_megabytes * 2**20:
        raise ValueError(f"The file is larger than {max_megabytes} MB. Upload a smaller one.")
    return decoder.decode(Path(path).read_bytes())


def read_texts(lines: str) -> list[str]:
    texts = [line.strip() for line in lines.splitlines() if line.strip()]
    if not texts:
        raise ValueError("There is no text yet. Write a line.")
    if len(texts) > MAX_TEXTS:
        raise ValueError(f"There are {len(texts)} lines; at most {MAX_TEXTS} are possible.")
    if longest := next((text for text in texts if len(text) > MAX_LENGTH), None):
        raise ValueError(f"A line has {len(longest)} characters; at most {MAX_LENGTH} are possible.")
    return texts


def read_rates(values: Sequence[float | None], layers: Sequence[int]) -> list[float]:
    for value, layer in zip(values, layers):
        if not (isinstance(value, (int, float)) and MIN_RATE <= value <= 1):
            raise ValueError(f"Layer {layer} needs a keep rate from {MIN_RATE} to 1.")
    return [float(value) for value in values]


def knows_scenes(asker: Asker) -> bool:
    """Tell by its vocabulary, which training makes of its data, if a checkpoint was trained on the bundled data."""
    own, shipped = asker.processor, TripsProcessor.from_pretrained(CHECKPOINT)
    has_vocabulary = own.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    return has_vocabulary and isinstance(asker.model, TripsForQuestionAnswering)


def introduction(asker: Asker, checkpoint: str) -> str:
    """Markdown that says what the page shows, and what the model knows."""
    name = "/".join(Path(checkpoint).parts[-2:])
    lines = ["# What the text makes the model look at", "Faded patches are dropped; the text chooses which."]
    if knows_scenes(asker):
        lines.append(
            f"Model: `{name}`. It knows composed scenes alone: four colored shapes, and questions as in the examples."
        )
    else:
        lines.append(
            f"Model: `{name}`. Images and texts unlike its training data get an answer, too, but not a good one."
        )
    if asker.model.config.vision_config.schedule.layers:
        lines.append(SAME_WEIGHTS_NOTE)
    return "\n\n".join(lines)


def build(args: AppArguments):
    """Return the page for a checkpoint, a `gradio.Blocks`."""
    import gradio as gr  # an extra

    asker, decoder = Asker(args.model), IsolatedDecoder()
    schedule = asker.schedule
    label, texts = TITLES[type(asker.model).__name__]

    def look(path: str | None, lines: str, *controls) -> str:
        guidances = controls[len(schedule) :]
        try:
            rates, texts = read_rates(controls[: len(schedule)], list(schedule)), read_texts(lines)
            image = read_upload(path, decoder, args.max_megabytes)
            return render_look(asker.ask(image, texts, rates, guidances))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def update(*values) -> str:
        """As `look`, with errors in place of the result: numbers are also incomplete while they are typed."""
        try:
            return look(*values)
        except gr.Error as error:
            return f"<p>{html.escape(error.message)}</p>"

    with gr.Blocks(title="TRIPS: what the text makes the model look at") as page:
        gr.Markdown(introduction(asker, args.model))
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(label="Image", sources=["upload", "clipboard"], type="filepath", height=260)
                # Gradio neither opens uploads nor checks numbers, so that the messages are those of this page.
                image.preprocess = lambda payload: None if payload is None else payload.path
                lines = gr.Textbox(texts, label=label, lines=3, max_lines=MAX_TEXTS)
                button = gr.Button("Look", variant="primary")
                with gr.Accordion("Selection schedule by layer", open=False):
                    rates = [
                        gr.Slider(MIN_RATE, 1.0, rate, step=0.05, label=f"Layer {layer} keeps (1: all)")
                        for layer, (rate, _) in schedule.items()
                    ]
                    for slider in rates:
                        slider.preprocess = lambda value: value
                    guidances = [
                        gr.Radio(GUIDANCES, value=guidance, label=f"Layer {layer} is guided by")
                        for layer, (_, guidance) in schedule.items()
                    ]
            with gr.Column(scale=3, min_width=280):
                result = gr.HTML(label="Answers", elem_id="result")
        inputs = [image, lines, *rates, *guidances]
        gr.on([button.click, lines.submit], look, inputs, result, api_name="look", concurrency_limit=1)
        changes = [control.change for control in [*rates, *guidances]]
        options = {"api_name": False, "show_progress": "minimal", "concurrency_limit": 1}
        gr.on(changes, update, inputs, result, trigger_mode="always_last", **options)
        if knows_scenes(asker):
            rows = [[str(SCENE), text] for text in EXAMPLES]
            clicked = gr.Examples(rows, [image, lines], cache_examples=False, elem_id="examples").load_input_event
            clicked = clicked.then(look, inputs, result, api_name=False)
            clicked.then(js="() => document.querySelector('#result').scrollIntoView()")  # far above, on a phone
    return page


def main(argv: list[str] | None = None, **launching):
    (args,) = make_parser(AppArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    page = build(args).queue(max_size=32, default_concurrency_limit=1)
    return page.launch(
        server_name=args.host,
        server_port=args.port,
        max_file_size=args.max_megabytes * 2**20,
        allowed_paths=[str(SCENE)],
        css=CSS,
        **launching,
    )


if __name__ == "__main__":
    run_script(main)
