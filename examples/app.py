"""
A web page to ask a model about images: answers, and the patches that each question keeps in each selection layer,
beside the same weights at keep rate 1.0. Needs the extra `app`.

    python examples/app.py                        # the model that comes with the project
    python examples/app.py --model demo/model     # any checkpoint that answers questions, or its name on the Hub
"""

import os


# Read when these libraries are imported. Without them, a start of the page is reported to their makers.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from dataclasses import dataclass
from pathlib import Path

from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script


@dataclass
class AppArguments:
    model: str = option(
        os.environ.get("TRIPS_MODEL", str(Path(__file__).with_name("trips-tiny-scenes"))),
        "A checkpoint: folder, or name on the Hub. On a Space: the variable TRIPS_MODEL.",
    )
    max_megabytes: int = option(10, "Largest file that can be uploaded.")
    host: str | None = option(None, "Address to listen on. Default: GRADIO_SERVER_NAME, or else 127.0.0.1.")
    port: int | None = option(None, "Default: the first free one from 7860.")


OPTIONS = make_parser(AppArguments, description=__doc__, script=__name__)

from modeling_trips import UNPRUNED, SelectionSchedule, TripsForQuestionAnswering
from modeling_trips.inspection.checkpoints import load_checkpoint, load_processor
from modeling_trips.untrusted_images import IsolatedDecoder
from trips_examples.ask import (
    CHECKPOINT,
    QUESTIONS,
    SAME_WEIGHTS,
    SAME_WEIGHTS_NOTE,
    SCENE,
    answers_of,
    draw_selection,
    shown,
)


MAX_QUESTIONS = 6
MAX_LENGTH = 300
DELETION = (60, 600)  # every minute, files that are older than ten minutes


def questions_of(lines: str) -> list[str]:
    """Return the questions, one per line. Raise a `ValueError` with a message for visitors if there is a mistake."""
    bounded = lines[: MAX_QUESTIONS * MAX_LENGTH]
    questions = [line.strip() for line in bounded.splitlines() if line.strip()]
    if not 1 <= len(questions) <= MAX_QUESTIONS:
        raise ValueError(f"Write 1 to {MAX_QUESTIONS} lines, got {len(questions)}.")
    return questions


def build(args: AppArguments):
    """Return the page for a checkpoint, a `gradio.Blocks`."""
    import gradio as gr  # an extra

    model = load_checkpoint(args.model, [TripsForQuestionAnswering])
    processor = load_processor(args.model, model.config)
    decoder = IsolatedDecoder()
    trained = model.config.vision_config.schedule
    is_own = args.model == str(CHECKPOINT)  # others do not know the scene

    def look(path: str | None, lines: str, threshold: float, *keep_rates: float):
        try:
            if path is None or not Path(path).is_file():
                raise ValueError("There is no image. Upload one; it is deleted after ten minutes.")
            questions = questions_of(lines)
            selections = []
            for selection, keep_rate in zip(trained.selections, keep_rates):
                selections.append(selection._replace(keep_rate=keep_rate))
            schedule = SelectionSchedule(trained.layers, tuple(selections))
            image = decoder.decode(Path(path).read_bytes())
            pruned = answers_of(model, processor, image, questions, schedule, threshold)
            unpruned = answers_of(model, processor, image, questions, UNPRUNED, threshold)
            figure = None
            if schedule.layers:
                answers = [best["answer"] for best in pruned]
                figure = draw_selection(model, processor, image, questions, answers, schedule)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        rows = []
        for question, own, other in zip(questions, pruned, unpruned):
            rows.append([question, shown(own), shown(other)])
        return rows, figure

    with gr.Blocks(title="TRIPS: what the text makes the model look at", delete_cache=DELETION) as page:
        gr.Markdown("# What the text makes the model look at\n\nFaded patches are dropped; the text chooses which.")
        name = "/".join(Path(args.model).parts[-2:])
        known = "It knows busy scenes only: colored shapes among clutter." if is_own else ""
        gr.Markdown(f"Model: `{name}`. {known}\n\n{SAME_WEIGHTS_NOTE}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(
                    str(SCENE) if is_own else None,
                    label="Image",
                    sources=["upload", "clipboard"],
                    type="filepath",
                    height=260,
                )
                image.preprocess = lambda payload: None if payload is None else payload.path  # Gradio does not open it
                lines = gr.Textbox(
                    "\n".join(QUESTIONS) if is_own else "", label="Questions, one per line", max_lines=MAX_QUESTIONS
                )
                threshold = gr.Slider(0, 1, 0, step=0.05, label="Probability below which an answer is unsure")
                sliders = [
                    gr.Slider(0.005, 1, selection.keep_rate, step=0.005, label=f"Keep rate of layer {layer}")
                    for layer, selection in trained.by_layer.items()
                ]
                button = gr.Button("Look", variant="primary")
            with gr.Column(scale=3, min_width=280):
                result = gr.Dataframe(headers=["question", "answer", SAME_WEIGHTS], wrap=True, interactive=False)
                figure = gr.Plot(show_label=False)
        changes = [button.click, lines.submit, *(slider.release for slider in (threshold, *sliders))]
        gr.on(changes, look, [image, lines, threshold, *sliders], [result, figure], api_name="look")
    return page


def main(argv: list[str] | None = None, block: bool = True):
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    page = build(args).queue(max_size=32, default_concurrency_limit=1)
    launched = page.launch(
        server_name=args.host,
        server_port=args.port,
        max_file_size=args.max_megabytes * 2**20,
        allowed_paths=[str(SCENE)],
        prevent_thread_lock=True,
        quiet=True,
    )
    _, address, _ = launched
    print(f"The page is at {address} until Ctrl+C.", flush=True)
    if block:
        page.block_thread()
    return launched


if __name__ == "__main__":
    run_script(main)
