"""
A page to ask a model about pictures: answers with scores (or the box), what each selection layer kept and how it
scored the patches, tokens and milliseconds, and the unpruned twin beside it. Needs the extra `app`.

    python examples/app.py                                   # the model that comes with the project
    python examples/app.py --model outputs/grounding         # any checkpoint of questions, captions or boxes

Installed without its source, the script is `python -m trips_examples.app`.
"""

import trips_examples  # noqa: F401  # isort: skip

import os
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
from easy_vqa import get_test_image_paths

from trips_examples.analysis.asking import Asker
from trips_examples.analysis.page import render_look
from trips_examples.ask import CHECKPOINT
from trips_examples.data.faults import BadRowError
from trips_examples.data.images import decode_image, open_image, upright_size
from trips_examples.training.parser import make_parser


MAX_TEXTS, MAX_LENGTH = 6, 300
GUIDANCES = ["text", "image", "random"]
TITLES = {
    "TripsForQuestionAnswering": ("Questions, one per line", "what color is the shape?\nis there a circle?"),
    "TripsForConditionalGeneration": ("How the caption begins", "a picture of"),
    "TripsForVisualGrounding": ("What to find, one per line", "the red circle"),
}
EXAMPLES = {  # questions by the number of a test picture of easy-VQA
    0: "what color is the shape?\nwhat shape is in the image?",
    1: "is there a circle?\nis there a rectangle?\nis there a triangle?",
    2: "is there not a red shape?",
    3: "what is the color of the shape?",
    4: "does the image contain a triangle?\nis there a green shape?",
    5: "what shape does the image contain?",
    6: "is there a blue shape?\nis there not a blue shape?",
    7: "what color is the shape?",
    8: "is a circle present?",
    9: "is there a black shape?\nwhat shape is present?",
}
CSS = """
.told { display: flex; flex-wrap: wrap; gap: 1rem; }
.told section { flex: 1 1 16rem; min-width: 0; padding: .75rem; border-radius: 8px; }
.told section { border: 1px solid var(--border-color-primary); }
.told figure { display: inline-block; margin: 0 .5rem .5rem 0; width: 45%; vertical-align: top; }
.told figure img { width: 100%; }
.told figcaption { font-size: .8rem; }
.told h3 { overflow-wrap: anywhere; }
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
    max_megapixels: float = field(default=25.0, metadata={"help": "Largest picture, in million pixels."})
    port: int | None = field(default=None, metadata={"help": "Default: the first free one from 7860."})


def read_picture(path: str | None, args: AppArguments) -> PIL.Image.Image:
    """The picture, upright and RGB. What is wrong with it is a `ValueError`, whose words the page shows."""
    if path is None:
        raise ValueError("There is no picture yet: upload one, or click an example.")
    if Path(path).stat().st_size > args.max_megabytes * 2**20:
        raise ValueError(f"The file is larger than {args.max_megabytes} MB: upload a smaller one.")
    try:
        with open_image(path) as opened:
            width, height = upright_size(opened)
        if width * height > args.max_megapixels * 10**6:
            raise ValueError(
                f"The picture has {width} x {height} pixels, {args.max_megapixels:g} million are the most: shrink it."
            )
        return decode_image(path)
    except BadRowError as error:
        raise ValueError(f"This is no picture that can be read ({error.reason}): upload a PNG or JPEG.") from error


def read_texts(lines: str) -> list[str]:
    texts = [line.strip() for line in lines.splitlines() if line.strip()]
    if not texts:
        raise ValueError("There is nothing to look for: write a line.")
    if len(texts) > MAX_TEXTS:
        raise ValueError(f"These are {len(texts)} lines, {MAX_TEXTS} are the most: leave some out.")
    if longest := next((text for text in texts if len(text) > MAX_LENGTH), None):
        raise ValueError(f"A line has {len(longest)} characters, {MAX_LENGTH} are the most: shorten it.")
    return texts


def build(args: AppArguments):
    """The page for a checkpoint, a `gradio.Blocks`."""
    import gradio as gr  # an extra

    asker = Asker(args.model)
    schedule = asker.schedule
    label, texts = TITLES[type(asker.model).__name__]

    def look(path: str | None, lines: str, *controls) -> str:
        rates, guidances = controls[: len(schedule)], controls[len(schedule) :]
        try:
            image, texts = read_picture(path, args), read_texts(lines)
            return render_look(asker.ask(image, texts, rates, guidances))
        except ValueError as error:  # of these, and of a text that is too long for the model
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="TRIPS: what the text makes the model look at") as page:
        gr.Markdown("# What the text makes the model look at\nFaded patches are dropped; the text chooses which.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(label="Picture", sources=["upload", "clipboard"], type="filepath", height=260)
                # Not opened by Gradio, so that what is wrong with a file is said in the words of this page. (Gradio
                # writes a stub beside each file that has a class made of a component.)
                image.preprocess = lambda payload: None if payload is None else payload.path
                lines = gr.Textbox(texts, label=label, lines=3, max_lines=MAX_TEXTS)
                button = gr.Button("Look", variant="primary")
                with gr.Accordion("Which layer keeps how much, and who chooses", open=False):
                    rates = [
                        gr.Slider(0.05, 1.0, rate, step=0.05, label=f"Layer {layer} keeps (1: all)")
                        for layer, (rate, _) in schedule.items()
                    ]
                    guidances = [
                        gr.Radio(GUIDANCES, value=guidance, label=f"Layer {layer} is guided by")
                        for layer, (_, guidance) in schedule.items()
                    ]
            with gr.Column(scale=3, min_width=280):
                result = gr.HTML(label="Answers", elem_id="result")
        inputs = [image, lines, *rates, *guidances]
        gr.on([button.click, lines.submit], look, inputs, result, api_name="look", concurrency_limit=1)
        for control in rates:
            control.release(look, inputs, result, api_name=False, show_progress="minimal")
        for control in guidances:
            control.input(look, inputs, result, api_name=False, show_progress="minimal")
        if "easy_vqa" in args.model or "easy-vqa" in args.model:
            paths = get_test_image_paths()
            rows = [[str(paths[number]), text] for number, text in EXAMPLES.items()]
            clicked = gr.Examples(rows, [image, lines], cache_examples=False, elem_id="examples").load_input_event
            clicked = clicked.then(look, inputs, result, api_name=False)
            clicked.then(js="() => document.querySelector('#result').scrollIntoView()")  # far above, on a phone
    return page


def main(argv: list[str] | None = None, **launching):
    (args,) = make_parser(AppArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    page = build(args).queue(max_size=32, default_concurrency_limit=1)
    folder = str(Path(get_test_image_paths()[0]).parent)
    return page.launch(
        server_port=args.port,
        max_file_size=args.max_megabytes * 2**20,
        allowed_paths=[folder],
        css=CSS,
        **launching,
    )


if __name__ == "__main__":
    main()
