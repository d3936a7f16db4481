"""The momentum teacher: moving average, queues, distilled targets, saving and loading."""

import pytest
import torch
from tiny_pretraining import SCHEDULES, make_batch, make_model
from torch.nn.functional import log_softmax, normalize, softmax

from modeling_trips import UNPRUNED
from modeling_trips.modeling_trips_pretraining import masked_language_loss, retrieval_loss
from trips_examples.training.momentum import FeatureQueue, MomentumTeacher


def test_the_teacher_is_a_moving_average():
    model = make_model()
    teacher = MomentumTeacher(model, momentum=0.75, queue_size=8)
    start = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    teacher.update(model)
    teacher.update(model)
    for name, value in teacher.model.named_parameters():
        torch.testing.assert_close(value, start[name] + 1 - 0.75**2)
        assert not value.requires_grad
    teacher.update(model.to(torch.bfloat16))
    for name, value in teacher.model.named_parameters():
        torch.testing.assert_close(value, start[name] + 1 - 0.75**3, rtol=0, atol=0.01)
        assert value.dtype == torch.float32
    teacher.update(model, momentum=0.0)
    assert all(torch.equal(a, b.float()) for a, b in zip(teacher.model.parameters(), model.parameters()))


def test_a_queue_overwrites_its_oldest_rows():
    queue = FeatureQueue(size=4, dim=1)
    for start, count in ((0, 3), (3, 2), (5, 4)):
        ids = torch.arange(start, start + count)
        queue.push(ids[:, None].float() * 10, ids)
    assert queue.ids.tolist() == [8, 5, 6, 7] and queue.features[:, 0].tolist() == [80, 50, 60, 70]
    assert queue.position == 1
    with pytest.raises(ValueError, match="4 rows"):
        queue.push(torch.zeros(5, 1), torch.arange(5))


def test_distilled_targets_by_hand():
    """One query, three candidates, one of which is absent."""
    queries, teachers = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    ids = torch.tensor([5, 6, -1])
    loss = retrieval_loss(queries, torch.tensor([5]), candidates, ids, 0.5, teachers, teacher_weight=0.4)
    student, teacher = log_softmax(torch.tensor([2.0, 0.0]), 0), softmax(torch.tensor([0.0, 2.0]), 0)
    target = 0.4 * teacher + 0.6 * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(loss, -(target * student).sum())


def test_distilled_words_by_hand():
    logits, teacher = torch.tensor([[[1.0, 0.0], [3.0, 1.0]]]), torch.tensor([[[0.0, 2.0], [9.0, 9.0]]])
    labels = torch.tensor([[0, -100]])
    student = log_softmax(logits[0, 0], 0)
    target = 0.4 * softmax(teacher[0, 0], 0) + 0.6 * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(masked_language_loss(logits, labels, teacher, 0.4), -(target * student).sum())
    torch.testing.assert_close(masked_language_loss(logits, labels), -student[0])
    assert masked_language_loss(logits, torch.full((1, 2), -100)) == 0


@torch.no_grad()
def test_past_batches_are_candidates_and_equal_ids_are_partners():
    """Against an explicit softmax over the batch's and the past batch's features."""
    model, batch = make_model(itm_weight=0.0, mlm_weight=0.0, prefix_lm_weight=0.0), make_batch()
    teacher = MomentumTeacher(model, queue_size=10)
    for parameter in teacher.model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # differs from the student
    teacher.push(teacher.teach(batch, 0.3)["teacher"])
    again = {**batch, "image_ids": torch.tensor([4, 8, 1])}  # a past batch had image 0 under the same id
    actual = model.eval()(**teacher.teach(again, 0.3)).itc_loss

    def features(owner):
        images = owner.vision_proj(owner.model.vision_model(batch["pixel_values"]).pooler_output)
        texts = owner.text_proj(owner.model.text_model(batch["input_ids"], batch["attention_mask"]).pooler_output)
        return normalize(images, dim=-1), normalize(texts, dim=-1)

    (images, texts), (teacher_images, teacher_texts) = features(model), features(teacher.model)
    image_ids, text_ids = torch.tensor([4, 8, 1, 4, 9, 6]), torch.tensor([4, 4, 8, 1, 8, 4, 4, 9, 6, 9])
    directions = [
        (images, teacher_images, image_ids[:3], teacher_texts.repeat(2, 1), text_ids),
        (texts, teacher_texts, text_ids[:5], teacher_images.repeat(2, 1), image_ids),
    ]
    losses = []
    for queries, teachers, query_ids, candidates, candidate_ids in directions:
        student = log_softmax(queries @ candidates.T / 0.07, dim=-1)
        guesses = softmax(teachers @ candidates.T / 0.07, dim=-1)
        same = (query_ids[:, None] == candidate_ids).float()
        targets = 0.3 * guesses + 0.7 * same / same.sum(1, keepdim=True)
        losses.append(-(targets * student).sum(-1).mean())
    torch.testing.assert_close(actual, sum(losses) / 2, rtol=1e-4, atol=1e-4)


def test_a_teacher_goes_on_where_it_was_saved(tmp_path):
    model, batch = make_model().train(), make_batch()
    teacher = MomentumTeacher(model, queue_size=8)
    teacher.push(teacher.teach(batch, 0.4)["teacher"])
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    teacher.update(model)
    teacher.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["momentum.safetensors"]
    again = MomentumTeacher(make_model(), queue_size=8)
    again.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), again.state_dict().values()))
    with pytest.raises(FileNotFoundError, match="momentum.safetensors"):
        again.load(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="images.features"):
        MomentumTeacher(model, queue_size=6).load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_teacher_looks_as_its_student_does(schedule):
    """With the student's weights it gives the student's outputs, for every guidance."""
    model, batch = make_model(**schedule), make_batch()
    for own in (None, UNPRUNED):
        actual = MomentumTeacher(model, queue_size=8).teach({**batch, "schedule": own}, 0.4)["teacher"]
        outputs = model(**batch, schedule=own)
        for name in ("image_embeds", "text_embeds", "mlm_logits"):
            torch.testing.assert_close(getattr(actual, name), outputs[name])
