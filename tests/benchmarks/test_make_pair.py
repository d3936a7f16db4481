"""`benchmarks/make_pair.py`: labels of patches, and all stages with few steps."""

import make_pair
import pytest
from json_files import read_json
from make_pair import NAMES, patch_labels

from modeling_trips import TripsForQuestionAnswering
from trips_examples.data.busy_scenes import Item


def test_patches_are_labelled_by_the_shape_on_their_center():
    # Patches of 8 pixels have their centers at 4, 12, 20 and 28.
    item = Item(color="red", shape="star", mark="bar", box=(5, 12, 28, 27))
    labels = patch_labels([item], patch_size=8, patches_per_side=4)
    red = NAMES["color"].index("red")
    none = len(NAMES["color"])
    rows = labels["color"].reshape(4, 4).tolist()
    assert rows == [[none] * 4, [none, red, red, none], [none, red, red, none], [none] * 4]
    assert labels["shape"].tolist().count(NAMES["shape"].index("star")) == 4
    assert labels["mark"].tolist().count(NAMES["mark"].index("bar")) == 4


@pytest.mark.slow
def test_all_stages_run_and_complete_ones_are_kept(tmp_path):
    options = ["--output_dir", str(tmp_path), "--train_scenes", "60", "--test_scenes", "4"]
    for stage in ("tower", "small", "unpruned", "pruned"):
        options += [f"--{stage}_steps", "3"]
    make_pair.main(options)
    schedules = {}
    for stage in ("small", "unpruned", "model"):
        results = read_json(tmp_path / stage / "all_results.json")
        assert results["regions_used_for"] == "none"
        model = TripsForQuestionAnswering.from_pretrained(tmp_path / stage)
        schedules[stage] = str(model.config.vision_config.schedule)
    assert schedules == {"small": "unpruned", "unpruned": "unpruned", "model": "2:text:0.005"}

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    make_pair.main(options)
    assert times == {path: path.stat().st_mtime_ns for path in times}
