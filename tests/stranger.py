"""
What a stranger types to use published checkpoints: run as a script, in an environment with or without this project.

    python stranger.py SOURCE IMAGE RESULTS < heads.json

SOURCE is the path or the Hub name of a checkpoint with `{}` in place of the head's class name. Loads the checkpoint of
every head through every Auto class, and the pipelines, and writes all that comes out to RESULTS/results.pt. Every head
is saved again to RESULTS/<class name>.
"""

import json
import sys

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoProcessor, pipeline


TEXTS = ["what color is it?", "is it a circle?"]


def use_model(model, inputs) -> dict:
    """The class, the weights, and what the model makes of the inputs."""
    generated = model.generate(**inputs, max_new_tokens=5) if model.can_generate() else None
    with torch.no_grad():
        outputs = getattr(model, "model", model)(**inputs)
    return {
        "class": type(model).__name__,
        "weights": dict(model.state_dict()),
        "states": outputs.last_hidden_state,
        "kept": [layer.kept_indices for layer in outputs.selection],
        "generated": generated,
    }


def use_checkpoint(source: str, image: str, head: str, auto_classes: list[str], folder: str) -> dict:
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    processor.save_pretrained(folder)  # before its use, which leaves its padding in the tokenizer
    inputs = processor(images=Image.open(image), text=TEXTS, image_index=[0, 0], return_tensors="pt")
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    results = {"inputs": dict(inputs), "keep_rate": config.keep_rate}
    for auto_class in auto_classes:
        torch.manual_seed(0)  # for weights that the checkpoint of another head lacks
        model = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True)
        results[auto_class] = use_model(model, inputs)
        if type(model).__name__ == head:
            model.save_pretrained(folder)
    return results


def use_pipelines(source: str, image: str) -> dict:
    def run(task, head, *args, **options):
        return pipeline(task, model=source.format(head), trust_remote_code=True)(*args, **options)

    question = [{"type": "image", "image": image}, {"type": "text", "text": TEXTS[0]}]
    chat = [{"role": "user", "content": question}]
    answering, writing = "TripsForQuestionAnswering", "TripsForConditionalGeneration"
    return {
        "answers": run("visual-question-answering", answering, image, TEXTS, top_k=3),
        "caption": run("image-to-text", writing, image, prompt="a picture of"),
        "stock caption": run("image-text-to-text", writing, image, text="a picture of "),
        "stock labels": run(
            "zero-shot-image-classification", "TripsForRetrieval", image, candidate_labels=["red", "blue"]
        ),
        "stock answer": run("image-text-to-text", answering, image, text=TEXTS[0], return_full_text=False),
        "chat answer": run("image-text-to-text", answering, text=chat),
    }


def main(source: str, image: str, folder: str):
    heads = json.load(sys.stdin)  # class name -> the Auto classes to load its checkpoint with
    results = {
        head: use_checkpoint(source.format(head), image, head, auto_classes, f"{folder}/{head}")
        for head, auto_classes in heads.items()
    }
    results["pipelines"] = use_pipelines(source, image)
    results["project"] = "modeling_trips" in sys.modules
    torch.save(results, f"{folder}/results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
