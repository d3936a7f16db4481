"""Access to rows: images come once."""

from datasets import Dataset

from trips_examples.data.rows import images_of


def test_images_of_captions_come_once():
    rows, image_of_text = images_of(Dataset.from_dict({"image_id": ["b", "a", "b", "c", "a"]}))
    assert rows == [0, 1, 3] and image_of_text.tolist() == [0, 1, 0, 2, 1]
