"""The momentum teacher: moving average, queues, distilled targets, saving and loading."""

import pytest
import torch
from tiny_pretraining import SCHEDULES, make_batch, make_model
from torch.nn.functional import log_softmax, normalize, softmax
from torch.testing import assert_close

from modeling_trips import UNPRUNED
from modeling_trips.modeling_trips_pretraining import masked_language_loss
from trips_examples.training.momentum import FeatureQueue, MomentumTeacher


def test_the_teacher_is_a_moving_average():
    model = make_model()
    teacher = MomentumTeacher(model, momentum=0.75, queue_size=8)
    starts = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    teacher.update(model)
    teacher.update(model)
    for parameter, start in zip(teacher.model.parameters(), starts):
        assert_close(parameter, start + 1 - 0.75**2)
        assert not parameter.requires_grad
    teacher.update(model.to(torch.bfloat16))
    for parameter, start in zip(teacher.model.parameters(), starts):
        assert_close(parameter, start + 1 - 0.75**3, rtol=0, atol=0.01)
        assert parameter.dtype == torch.float32


def test_a_queue_overwrites_its_oldest_rows():
    queue = FeatureQueue(size=4, dim=1)
    for ids in torch.arange(9).split((3, 2, 4)):
        queue.push(ids[:, None].float() * 10, ids)
    assert queue.ids.tolist() == [8, 5, 6, 7]
    assert queue.features[:, 0].tolist() == [80, 50, 60, 70]
    assert queue.position == 1
    with pytest.raises(ValueError, match="4 rows"):
        queue.push(torch.zeros(5, 1), torch.arange(5))


def test_distilled_words_by_hand():
    logits = torch.tensor([[[1.0, 0.0], [3.0, 1.0]]])
    teacher_logits = torch.tensor([[[0.0, 2.0], [9.0, 9.0]]])
    labels = torch.tensor([[0, -100]])
    student = log_softmax(logits[0, 0], dim=0)
    teacher = softmax(teacher_logits[0, 0], dim=0)
    target = 0.4 * teacher + 0.6 * torch.tensor([1.0, 0.0])
    loss = masked_language_loss(logits, labels, teacher_logits, 0.4)
    assert_close(loss, -(target * student).sum())
    assert_close(masked_language_loss(logits, labels), -student[0])
    assert masked_language_loss(logits, torch.full((1, 2), -100)) == 0


@torch.no_grad()
def test_past_batches_are_candidates_and_equal_ids_are_partners():
    """Against an explicit softmax over the batch's and the past batch's features."""
    model = make_model(itm_weight=0.0, mlm_weight=0.0, prefix_lm_weight=0.0)
    batch = make_batch()
    teacher = MomentumTeacher(model, queue_size=10)
    for parameter in teacher.model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # differs from the student
    teacher.push(teacher.teach(batch, 0.3)["teacher"])
    again = {**batch, "image_ids": torch.tensor([4, 8, 1])}  # a past batch had image 0 under the same id
    actual = model.eval()(**teacher.teach(again, 0.3)).itc_loss

    def features(owner):
        image_states = owner.model.vision_model(batch["pixel_values"]).pooler_output
        text_states = owner.model.text_model(batch["input_ids"], batch["attention_mask"]).pooler_output
        images = normalize(owner.vision_proj(image_states), dim=-1)
        texts = normalize(owner.text_proj(text_states), dim=-1)
        return images, texts

    def loss(queries, teacher_queries, query_ids, candidates, candidate_ids):
        candidates = candidates.repeat(2, 1)  # those of the batch, and the same ones of the past batch
        student = log_softmax(queries @ candidates.T / 0.07, dim=-1)
        guesses = softmax(teacher_queries @ candidates.T / 0.07, dim=-1)
        same = (query_ids[:, None] == candidate_ids).float()
        targets = 0.3 * guesses + 0.7 * same / same.sum(dim=1, keepdim=True)
        return -(targets * student).sum(dim=-1).mean()

    images, texts = features(model)
    teacher_images, teacher_texts = features(teacher.model)
    image_ids = torch.tensor([4, 8, 1, 4, 9, 6])
    text_ids = torch.tensor([4, 4, 8, 1, 8, 4, 4, 9, 6, 9])
    image_loss = loss(images, teacher_images, image_ids[:3], teacher_texts, text_ids)
    text_loss = loss(texts, teacher_texts, text_ids[:5], teacher_images, image_ids)
    assert_close(actual, (image_loss + text_loss) / 2, rtol=1e-4, atol=1e-4)


def test_a_teacher_goes_on_where_it_was_saved(tmp_path):
    model = make_model().train()
    teacher = MomentumTeacher(model, queue_size=8)
    teacher.push(teacher.teach(make_batch(), 0.4)["teacher"])
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    teacher.update(model)
    teacher.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["momentum.safetensors"]
    again = MomentumTeacher(make_model(), queue_size=8)
    again.load(tmp_path)
    assert_close(again.state_dict(), teacher.state_dict(), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match="momentum.safetensors"):
        again.load(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="images.features"):
        MomentumTeacher(model, queue_size=6).load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_teacher_looks_as_its_student_does(schedule):
    """With the student's weights it gives the student's outputs, for every guidance."""
    model = make_model(**schedule)
    teacher = MomentumTeacher(model, queue_size=8)
    for current in (None, UNPRUNED):
        batch = {**make_batch(), "schedule": current}
        actual = teacher.teach(batch, 0.4)["teacher"]
        outputs = model(**batch)
        for name in ("image_embeds", "text_embeds", "mlm_logits"):
            assert_close(getattr(actual, name), outputs[name])
