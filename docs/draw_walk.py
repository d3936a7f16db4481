"""
Draw docs/walk.png: an image and a question in the layers of the shipped model.

    python docs/draw_walk.py
    python docs/draw_walk.py --question "what color is the cross?" --output walk.png
"""

from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from modeling_trips import TripsForQuestionAnswering, TripsProcessor, TripsSelection
from modeling_trips.inspection import draw_kept_patches
from modeling_trips.inspection.pictures import fit_for_drawing
from trips_examples.ask import CHECKPOINT, SCENE, answers_of
from trips_examples.training.parser import make_parser


CLS, FUSED, LINE = "#1864ab", "#d9480f", "#495057"
COLUMN = 2.2  # inches, of which a panel takes four fifths
HEIGHT = 0.30  # of a panel, as a share of the figure
PICTURES, TOKENS, TEXTS = 0.41, 0.03, 0.85  # the bottoms of both rows, and the middle of the upper one


def draw_scores(image: PIL.Image.Image, boxes: torch.Tensor, scores: torch.Tensor) -> PIL.Image.Image:
    """
    Draw scores as color on a gray image, relative to the highest score.

    Args:
        image (`PIL.Image.Image`): The original image. It is drawn with sides of 256 to 1024 pixels.
        boxes (`torch.Tensor` of shape `(num_candidates, 4)`): (x0, y0, x1, y1) in pixels of the image.
        scores (`torch.Tensor` of shape `(num_candidates,)`): Scores of at least 0. Their square roots are drawn.
    """
    image, scale = fit_for_drawing(image, min_side=256)
    grey = image.convert("L").convert("RGB")
    opacity = PIL.Image.new("L", grey.size)
    draw = PIL.ImageDraw.Draw(opacity)
    strength = (scores / scores.max().clamp_min(1e-12)).sqrt()
    for (x0, y0, x1, y1), share in zip((boxes.cpu() * scale).round().int().tolist(), strength.tolist()):
        if x0 < x1 and y0 < y1:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=round(230 * share))
    return PIL.Image.composite(PIL.Image.new("RGB", grey.size, "#d9480f"), grey, opacity)


@dataclass
class WalkArguments:
    image: str = field(default=str(SCENE), metadata={"help": "An image. Default: a scene of seven shapes."})
    question: str = field(default="what shape is the green one?", metadata={"help": "Question about the image."})
    output: str = field(default=str(Path(__file__).parent / "walk.png"), metadata={"help": "File of the figure."})


class Walk:
    """A model with an answered question, and its figure."""

    def __init__(self, path: str, question: str):
        self.model = TripsForQuestionAnswering.from_pretrained(CHECKPOINT).eval()
        self.processor = TripsProcessor.from_pretrained(CHECKPOINT)
        with PIL.Image.open(path) as opened:
            self.image = opened.convert("RGB")
        self.question = question
        (self.answer,) = answers_of(self.model, self.processor, self.image, [question])
        inputs = self.processor(images=self.image, text=question, return_tensors="pt")
        with torch.no_grad():
            output = self.model.model(**inputs, output_hidden_states=True)
        self.selections = dict(zip(self.model.config.vision_config.schedule.layers, output.selection))
        self.rows, self.places = self.model.config.vision_config.grid_size  # of patches
        self.tokens = [states.shape[1] for states in output.vision_model_output.hidden_states[1:]]
        num_columns = 2 + 2 * len(self.selections)
        self.figure = Figure(figsize=(COLUMN * num_columns, 5.6), dpi=110)
        self.step = 1 / num_columns
        self.width = 0.8 * self.step
        self.columns = [0.06 * self.step + self.step * number for number in range(num_columns)]

    def boxes(self, indices: torch.LongTensor) -> torch.Tensor:
        """Return the boxes of the patches among the tokens, in pixels of the image."""
        return self.processor.patch_boxes(indices[None], [(self.image.height, self.image.width)])[0]

    def draw(self) -> Figure:
        everything = torch.arange(self.rows * self.places)
        picture = draw_kept_patches(self.image, self.boxes(everything), outline=None)
        self.panel(0, picture, f"{len(everything)} patches", grid=True)
        self.sequence(0, everything, 0, f"layer 1: {self.tokens[0]} tokens\nthe same for every question")
        columns = iter(range(1, len(self.columns) - 1))
        for layer, selection in self.selections.items():
            self.scores(next(columns), layer, selection)
            self.kept(next(columns), layer, selection)
        self.texts()
        return self.figure

    def panel(self, column: int, picture: PIL.Image.Image, title: str, grid: bool = False):
        axes = self.figure.add_axes((self.columns[column], PICTURES, self.width, HEIGHT))
        axes.imshow(picture)
        axes.set_title(title, fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(LINE)
        if grid:
            for row in range(self.rows):
                axes.axhline(row * picture.height / self.rows - 0.5, color=LINE, linewidth=0.4)
            for place in range(self.places):
                axes.axvline(place * picture.width / self.places - 0.5, color=LINE, linewidth=0.4)

    def scores(self, column: int, layer: int, selection: TripsSelection):
        candidates, scores = selection.candidate_indices[0], selection.scores[0].float()
        picture = draw_scores(self.image, self.boxes(candidates), scores[candidates >= 0])
        self.panel(column, picture, f"layer {layer}: the text's scores")
        middle = self.columns[column] + self.width / 2
        self.arrow((middle, TEXTS), (middle, PICTURES + HEIGHT + 0.05), CLS)
        self.arrow_to(column)

    def kept(self, column: int, layer: int, selection: TripsSelection):
        indices = selection.kept_indices[0]
        patches = indices[indices >= 0]
        picture = draw_kept_patches(self.image, self.boxes(patches))
        self.panel(column, picture, f"layer {layer} keeps {len(patches)} patches")
        num_fused = 1 + len(indices) - len(patches)
        self.sequence(column, patches, num_fused, f"layer {layer}: {self.tokens[layer - 1]} tokens remain")
        self.arrow_to(column)

    def sequence(self, column: int, patches: torch.LongTensor, num_fused: int, title: str):
        """Draw the tokens in their order: [CLS], then from the next line on the patches, then fused tokens."""
        axes = self.figure.add_axes((self.columns[column], TOKENS, self.width, HEIGHT - 0.03))
        shown = [self.image.crop(tuple(box)) for box in self.boxes(patches).int().tolist()]
        for place, token in enumerate([CLS, *[None] * (self.places - 1), *shown, *[FUSED] * num_fused]):
            if token is None:
                continue
            row, left = divmod(place, self.places)
            color = token if isinstance(token, str) else "none"
            axes.add_patch(Rectangle((left, -row - 0.9), 0.9, 0.9, facecolor=color, edgecolor=LINE, lw=0.4, zorder=2))
            if color == "none":
                axes.imshow(token, extent=(left, left + 0.9, -row - 0.9, -row))
        axes.set(xlim=(-0.1, self.places), ylim=(-self.rows - 1, 0.1), aspect="equal", anchor="N")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()

    def texts(self):
        """Draw the question above the images, and the answer behind them."""
        write, middle, half = self.figure.text, PICTURES + HEIGHT / 2, self.width / 2
        first, second, *_, last = self.columns
        box = {"boxstyle": "round,pad=0.5", "facecolor": "#e7f5ff", "edgecolor": CLS}
        write(first, 0.94, f"“{self.question}”", fontsize=12, va="center", weight="bold")
        self.arrow((first + half, TEXTS), (last + half, TEXTS), CLS, style="-")
        write(first + half, TEXTS, "text encoder", fontsize=11, va="center", ha="center", bbox=box, zorder=5)
        ways = "its [CLS] is the query of the scores; its states go to the fusion encoder"
        write(second, TEXTS + 0.02, ways, fontsize=9, color=CLS)
        fusion = f"later layers and\nfusion encoder\nread {self.tokens[-1]} tokens\ninstead of {self.tokens[0]}"
        self.arrow_to(len(self.columns) - 1)
        write(last + half, middle, fusion, fontsize=11, va="center", ha="center", bbox=box)
        self.arrow((last + half, TEXTS), (last + half, middle + 0.12), CLS)
        self.arrow((last + half, middle - 0.12), (last + half, PICTURES - 0.07))
        answer = f"{self.answer['answer']} ({self.answer['score']:.1%})"
        write(last + half, PICTURES - 0.13, answer, fontsize=14, ha="center", weight="bold", color=FUSED)
        for row, (color, meaning) in enumerate({CLS: "[CLS]", FUSED: "fused token"}.items()):
            write(second, 0.22 - 0.05 * row, "■", fontsize=12, color=color)
            write(second + 0.1 * self.step, 0.22 - 0.05 * row, meaning, fontsize=9)

    def arrow_to(self, column: int):
        """Draw an arrow from the panel before."""
        middle = PICTURES + HEIGHT / 2
        self.arrow(
            (self.columns[column] - 0.18 * self.step, middle), (self.columns[column] - 0.02 * self.step, middle)
        )

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = LINE, style: str = "-|>"):
        self.figure.add_artist(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=12, color=color))


def main(argv: list[str] | None = None):
    (args,) = make_parser(WalkArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    Walk(args.image, args.question).draw().savefig(args.output)


if __name__ == "__main__":
    main()
