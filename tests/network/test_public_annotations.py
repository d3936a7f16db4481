"""One public annotation file of each task has the published number of items and no bad rows."""

import zipfile
from pathlib import Path

import pytest

from trips_examples.data.annotations import AnnotationFile, read_annotations
from trips_examples.data.tasks import TASKS, BadRowError


pytestmark = pytest.mark.network

VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"


def extracted(archive: Path, name: str) -> Path:
    """Return the file of this name in an archive, in any folder."""
    folder = archive.with_suffix("")
    with zipfile.ZipFile(archive) as file:
        member = next(member for member in file.namelist() if member.rsplit("/", 1)[-1] == name)
        return Path(file.extract(member, folder))


def vqav2(download) -> AnnotationFile:
    questions = extracted(download(VQA + "v2_Questions_Val_mscoco.zip"), "v2_OpenEnded_mscoco_val2014_questions.json")
    answers = extracted(download(VQA + "v2_Annotations_Val_mscoco.zip"), "v2_mscoco_val2014_annotations.json")
    return AnnotationFile.of(str(questions), str(answers), "val", None)


def coco(download) -> AnnotationFile:
    archive = download("http://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip")
    return AnnotationFile.of(str(extracted(archive, "dataset_coco.json")), None, "val", None)


def nlvr2(download) -> AnnotationFile:
    path = download("https://raw.githubusercontent.com/lil-lab/nlvr/master/nlvr2/data/dev.json")
    return AnnotationFile.of(str(path), None, "val", None)


def refcoco(download) -> AnnotationFile:
    archive = download("https://bvisionweb1.cs.unc.edu/licheng/referit/data/refcoco.zip")
    refs, instances = extracted(archive, "refs(unc).p"), extracted(archive, "instances.json")
    return AnnotationFile.of(str(refs), str(instances), "val", None)


@pytest.mark.parametrize(
    ("task", "file", "num_records", "num_rows"),
    [
        ("vqa", vqav2, 214_354, 214_354),
        ("captions", coco, 5_000, 25_010),
        ("nlvr2", nlvr2, 6_982, 6_982),
        ("grounding", refcoco, 3_811, 10_834),
    ],
)
def test_public_file(task, file, num_records, num_rows, download):
    records = [record for _, record in read_annotations(file(download), task)]
    assert not [record for record in records if isinstance(record, BadRowError)]
    assert len(records) == num_records
    assert sum(len(TASKS[task].read_texts(record)) for record in records) == num_rows
