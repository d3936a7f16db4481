"""The pipelines give the model's answers, in every form of call that version 4 of Transformers documented."""

import base64
import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import pipeline

from modeling_trips import (
    UNPRUNED,
    TripsForConditionalGeneration,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsProcessor,
    convert_to_rgb,
)
from modeling_trips.pipeline_trips import best_answers, without_rest


QUESTIONS = ["what color is it?", "is it a circle?", "is it red?"]


def make_image(seed):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (40, 56, 3), generator=generator, dtype=torch.uint8).numpy())


IMAGES = [make_image(seed) for seed in range(3)]
PICTURES = Features({"image": ImageFeature(), "question": Value("string")})
SHORT = {"max_new_tokens": 3}


def load(head, checkpoints):
    folder = checkpoints[head.__name__]
    model = head.from_pretrained(folder).eval()
    # Weights of this scale give different answers to all questions and images, and answers that end.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 2
    return head.pipeline_class(model=model, processor=TripsProcessor.from_pretrained(folder))


@pytest.fixture(scope="module")
def oracle(checkpoints):
    return load(TripsForQuestionAnswering, checkpoints)


@pytest.fixture(scope="module")
def captioner(checkpoints):
    return load(TripsForConditionalGeneration, checkpoints)


def direct_answers(oracle, image, question, top_k, **options):
    """Answer one question by hand: a beam search, and the probability of each sequence token by token."""
    model = oracle.model
    inputs = oracle.processor(images=image, text=question, return_tensors="pt")
    sequences = model.generate(**inputs, num_beams=top_k, num_return_sequences=top_k, **options)
    answers = []
    for sequence in sequences:
        tokens = [token for token in sequence.tolist()[1:] if token != model.config.pad_token_id]
        prefix = [model.config.decoder_start_token_id]
        probability = 1.0
        for token in tokens:
            logits = model(**inputs, decoder_input_ids=torch.tensor([prefix])).logits[0, -1]
            probability *= logits.softmax(-1)[token].item()
            prefix.append(token)
        (answer,) = oracle.processor.post_process_answers(sequence[None])
        answers.append({"score": probability, "answer": answer})
    return sorted(answers, key=lambda answer: -answer["score"])


def assert_same(actual, expected):
    assert [answer["answer"] for answer in actual] == [answer["answer"] for answer in expected]
    scores = [answer["score"] for answer in actual]
    assert scores == pytest.approx([answer["score"] for answer in expected], rel=1e-3)


@torch.no_grad()
def test_answers_are_those_of_a_beam_search_with_their_probabilities(oracle):
    answers = oracle(IMAGES[0], QUESTIONS[0], top_k=3, max_new_tokens=4)
    by_hand = direct_answers(oracle, IMAGES[0], QUESTIONS[0], top_k=3, max_new_tokens=4)
    assert_same(answers, [answer for answer in by_hand if answer["answer"]])
    assert answers[0]["score"] > answers[1]["score"] > 0
    assert oracle(IMAGES[0], QUESTIONS[0]) == oracle(IMAGES[0], QUESTIONS[0], top_k=5)


def test_the_schedule_of_a_call_counts(oracle, classifier):
    for pipe, inputs in ((oracle, {"question": QUESTIONS[0]}), (classifier, {"candidate_labels": ["red", "blue"]})):
        unpruned = pipe(IMAGES[0], **inputs, schedule=UNPRUNED)
        assert unpruned != pipe(IMAGES[0], **inputs)
        assert unpruned == pipe(IMAGES[0], **inputs, schedule="unpruned")
        at_a_rate = pipe(IMAGES[0], **inputs, schedule="2:image:0.5", keep_rate=0.25)
        assert at_a_rate == pipe(IMAGES[0], **inputs, schedule="2:image:0.25")


def test_beams_end_at_their_first_end_token():
    labels = torch.tensor([[0, 5, 2, 0], [2, 0, 0, 0], [5, 0, 3, 2]])
    assert without_rest(labels, 2).tolist() == [[0, 5, 2, -100], [2, -100, -100, -100], [5, 0, 3, 2]]
    assert without_rest(labels, [3, 5]).tolist() == [[0, 5, -100, -100], [2, 0, 0, 0], [5, -100, -100, -100]]
    assert torch.equal(without_rest(labels, None), labels)


def test_probabilities_of_equal_answers_add_up_and_an_empty_one_counts_alone():
    beams = [("", 0.5), ("no", 0.125), ("yes", 0.0625), ("yes", 0.125)]  # of one question
    assert best_answers(beams) == [{"score": 0.1875, "answer": "yes"}, {"score": 0.125, "answer": "no"}]
    assert best_answers([("", 0.5), ("", 0.25)]) == [{"score": 0.75, "answer": ""}]
    # The rest of a word is no answer.
    assert best_answers([("##2", 0.6), ("2", 0.3)]) == [{"score": 0.3, "answer": "2"}]
    assert best_answers([("##2", 0.6)]) == [{"score": 0.6, "answer": "##2"}]


def test_an_answer_below_the_threshold_is_unsure(oracle):
    (best,) = oracle(image=IMAGES[0], question=QUESTIONS[0], top_k=1)
    for threshold, answer in ((best["score"] - 1e-4, best["answer"]), (best["score"] + 1e-4, "unsure")):
        given = oracle(image=IMAGES[0], question=QUESTIONS[0], top_k=1, threshold=threshold)
        assert given == [{"score": pytest.approx(best["score"]), "answer": answer}]


def test_the_temperature_of_the_configuration_divides_the_logits(oracle):
    model = oracle.model
    (raw,) = oracle(image=IMAGES[0], question=QUESTIONS[0], top_k=1, **SHORT)
    inputs = oracle.processor(images=IMAGES[0], text=QUESTIONS[0], return_tensors="pt")
    sequence = model.generate(**inputs, **SHORT)
    labels = without_rest(sequence[:, 1:], model.generation_config.eos_token_id)
    logits = model(**inputs, labels=labels).logits[0] / 2.5
    written = labels[0] != -100
    expected = logits.log_softmax(dim=-1)[written, labels[0, written]].sum().exp().item()
    model.config.confidence_temperature = 2.5
    try:
        (calibrated,) = oracle(image=IMAGES[0], question=QUESTIONS[0], top_k=1, **SHORT)
    finally:
        model.config.confidence_temperature = 1.0
    assert calibrated["answer"] == raw["answer"]
    assert calibrated["score"] == pytest.approx(expected, rel=1e-4) != raw["score"]


def test_a_question_with_words_that_no_training_question_had_is_marked(oracle):
    tokens = oracle.processor.tokenizer(QUESTIONS[:2])["input_ids"]
    config = oracle.model.config
    (answer,) = oracle(image=IMAGES[0], question="what 色", top_k=1)  # unknown to the tokenizer
    assert answer["unknown_words"] == ["[UNK]"]
    config.question_tokens = " ".join(str(token) for token in sorted(set(sum(tokens, []))))
    try:
        ((known,), (unknown,)) = oracle(image=IMAGES[0], question=["what circle is it?", "is it red?"], top_k=1)
    finally:
        config.question_tokens = None
    assert "unknown_words" not in known and unknown["unknown_words"] == ["red"]


def test_every_form_of_call_gives_the_same_answers(oracle, tmp_path):
    by_hand = {}
    for i, image in enumerate(IMAGES):
        for q, question in enumerate(QUESTIONS):
            by_hand[i, q] = direct_answers(oracle, image, question, top_k=1, max_new_tokens=4)
    assert len({answers[0]["score"] for answers in by_hand.values()}) == 9  # mixed-up pairs would be detected

    def check(actual, *pairs):
        for answers, pair in zip(actual, pairs, strict=True):
            assert_same(answers, by_hand[pair])

    def ask(*args, **options):
        return oracle(*args, top_k=1, max_new_tokens=4, **options)

    pairs = [(0, 0), (1, 2), (2, 1)]
    items = [{"image": IMAGES[i], "question": QUESTIONS[q]} for i, q in pairs]
    path = tmp_path / "image.png"
    IMAGES[1].save(path)
    assert ask([], "red?") == []
    assert ask([]) == []
    assert_same(ask(image=IMAGES[0], question=QUESTIONS[1]), by_hand[0, 1])
    assert_same(ask(items[1]), by_hand[1, 2])
    assert_same(ask(str(path), QUESTIONS[2]), by_hand[1, 2])
    for batch_size in (1, 2):
        check(ask(items, batch_size=batch_size), *pairs)
        check(ask(IMAGES, QUESTIONS[0], batch_size=batch_size), (0, 0), (1, 0), (2, 0))
        check(ask(IMAGES[0], QUESTIONS, batch_size=batch_size), (0, 0), (0, 1), (0, 2))
        by_question = ask(IMAGES[:2], QUESTIONS[:2], batch_size=batch_size)  # question by question, as in version 4
        check(by_question, (0, 0), (1, 0), (0, 1), (1, 1))
        mixed = ask([{"image": IMAGES[0], "question": QUESTIONS[:2]}, items[1]], batch_size=batch_size)
        check(mixed[0], (0, 0), (0, 1))
        assert_same(mixed[1], by_hand[1, 2])
        stream = ask((item for item in items), batch_size=batch_size)
        assert not isinstance(stream, list)
        check(stream, *pairs)


@pytest.fixture
def web(tmp_path):
    """Serve the files in `tmp_path` and return the URL."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_images_come_from_the_web(oracle, captioner, tmp_path, web):
    IMAGES[1].save(tmp_path / "image.png")
    answers = oracle(f"{web}/image.png", QUESTIONS[0], **SHORT)
    assert_same(answers, oracle(IMAGES[1], QUESTIONS[0], **SHORT))
    captions = captioner([f"{web}/image.png", IMAGES[0]], timeout=10.0, **SHORT)
    assert captions == captioner([IMAGES[1], IMAGES[0]], **SHORT)
    for ask in (lambda image: oracle(image, QUESTIONS[0], timeout=10.0), captioner):
        with pytest.raises(ValueError, match=f"{web}/missing.png"):
            ask(f"{web}/missing.png")


@torch.no_grad()
def test_answers_can_be_picked_from_a_list(oracle):
    answers = ["red", "blue", "yes", "no"]
    picked = oracle(IMAGES[0], QUESTIONS[:2], answers=answers, top_k=3)
    inputs = oracle.processor(images=IMAGES[0], text=QUESTIONS[:2], image_index=[0, 0], return_tensors="pt")
    ranking = oracle.model.rank_answers(oracle.processor.encode_answers(answers), **inputs)
    for found, indices, scores in zip(picked, ranking.answer_indices, ranking.scores.exp(), strict=True):
        expected = [{"answer": answers[i], "score": score.item()} for i, score in zip(indices, scores)]
        assert_same(found, expected[:3])


def test_captions_are_what_the_model_writes_after_the_prompt(captioner):
    def direct(image, prompt=""):
        inputs = captioner.processor(images=image, text=prompt, return_tensors="pt")
        sequences = captioner.model.generate(**inputs, max_new_tokens=5)
        return captioner.processor.post_process_answers(sequences)[0]

    captions = [[{"generated_text": direct(image)}] for image in IMAGES]
    assert captioner(IMAGES[0], max_new_tokens=5) == captions[0]
    for batch_size in (1, 2):
        assert captioner(IMAGES, max_new_tokens=5, batch_size=batch_size) == captions
    prompted = captioner(IMAGES[0], prompt="a picture of ", max_new_tokens=5)
    assert prompted == [{"generated_text": "a picture of " + direct(IMAGES[0], "a picture of ")}]
    several = captioner(IMAGES[:2], num_beams=3, num_return_sequences=2, max_new_tokens=5, batch_size=2)
    assert [len(item) for item in several] == [2, 2]
    assert several[0] != several[1]


@pytest.fixture
def stock(oracle):
    return pipeline("image-text-to-text", model=oracle.model, processor=oracle.processor)


def messages(image, *texts):
    content = [{"type": "image", "image": image}]
    content += [{"type": "text", "text": text} for text in texts]
    return [{"role": "user", "content": content}]


def test_the_stock_pipeline_answers_plainly_and_in_chats(stock, oracle, captioner):
    assert len(stock(IMAGES[0], text=QUESTIONS[0])) == 1  # without a length: the checkpoint's limit, not 256 tokens
    chats = [messages(IMAGES[i], QUESTIONS[i]) for i in range(2)]
    plain = stock(IMAGES[:2], text=QUESTIONS[:2], return_full_text=False, max_new_tokens=5)
    for row, image, question in zip(plain, IMAGES, QUESTIONS):
        assert row["generated_text"] == oracle(image, question, top_k=1, max_new_tokens=5)[0]["answer"]
    for batch_size in (1, 2):
        answers = stock(text=chats, batch_size=batch_size, return_full_text=False, max_new_tokens=5)
        assert [row[0]["generated_text"] for row in answers] == [row["generated_text"] for row in plain]
    (dialogue,) = stock(text=chats[0], max_new_tokens=5)
    assert dialogue["generated_text"][-1] == {"role": "assistant", "content": plain[0]["generated_text"]}

    stock_captioner = pipeline("image-text-to-text", model=captioner.model, processor=captioner.processor)
    (answer,) = stock_captioner(text=messages(IMAGES[0]), return_full_text=False, max_new_tokens=5)
    (expected,) = captioner(IMAGES[0], max_new_tokens=5)
    assert answer["generated_text"] == expected["generated_text"]
    chat = messages(IMAGES[0], "a picture of")
    (answer,) = stock_captioner(text=chat, return_full_text=False, max_new_tokens=5)
    (expected,) = captioner(IMAGES[0], prompt="a picture of", max_new_tokens=5)
    assert f"a picture of {answer['generated_text']}" == expected["generated_text"]


def test_a_conversation_is_refused(stock):
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    with pytest.raises(TemplateError, match="message"):
        stock(text=[*messages(IMAGES[0], QUESTIONS[0]), answer, *messages(IMAGES[0], QUESTIONS[1])])


@pytest.fixture
def classifier(checkpoints):
    return load(TripsForRetrieval, checkpoints)


@torch.no_grad()
def test_images_are_classified_by_their_similarity_to_texts(classifier):
    labels = ["a red circle", "blue"]
    found = classifier(IMAGES[0], candidate_labels=labels, hypothesis_template="a picture of {}")
    texts = [f"a picture of {label}" for label in labels]
    inputs = classifier.processor(images=IMAGES[0], text=texts, image_index=[0, 0], return_tensors="pt")
    logits = classifier.model(
        input_ids=inputs.input_ids, pixel_values=inputs.pixel_values, attention_mask=inputs.attention_mask
    ).logits_per_image
    expected = dict(zip(labels, logits.softmax(-1)[0].tolist()))
    assert {row["label"]: row["score"] for row in found} == pytest.approx(expected)


def test_transparent_pixels_are_white_by_every_road(oracle, captioner, classifier, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 40, 4), dtype=np.uint8)
    clear = Image.fromarray(pixels)
    path = tmp_path / "clear.png"
    clear.save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    on_white = convert_to_rgb(clear)
    labels = ["red", "blue", "green"]
    for given in (clear, str(path), text):
        assert classifier(given, candidate_labels=labels) == classifier(on_white, candidate_labels=labels)
        assert_same(oracle(given, "red?", **SHORT), oracle(on_white, "red?", **SHORT))
        assert captioner(given, **SHORT) == captioner(on_white, **SHORT)


@pytest.mark.parametrize(
    "question, options, item",
    [
        (None, {}, "question"),
        (["is it red?", "  "], {}, "'  '"),
        ("red?", {"top_k": 0}, "top_k"),
        ("red?", {"answers": ["red", ""]}, r"answers\[1\]"),
        ("red?", {"max_tokens": 3}, "max_tokens"),
    ],
)
def test_bad_questions_and_options_are_refused_by_name(oracle, question, options, item):
    with pytest.raises(ValueError, match=item):
        oracle({"image": IMAGES[0], "question": question}, **options)


@pytest.mark.parametrize("images", [[IMAGES[:2], IMAGES[1:]], np.zeros((2, 40, 40, 3), dtype=np.uint8)], ids=type)
def test_several_images_of_an_item_are_refused(oracle, captioner, images):
    with pytest.raises(ValueError, match="image"):
        oracle(images, QUESTIONS[0], **SHORT)
    with pytest.raises(ValueError, match="image"):
        captioner(images, **SHORT)


def test_a_prompt_for_each_image_is_refused_by_name(captioner):
    with pytest.raises(ValueError, match="prompt"):
        captioner(IMAGES[:2], prompt=["a", "b"])


def test_long_texts_are_cut_on_request(oracle, captioner):
    long = "red " * 100
    fits = "red " * (oracle.processor.tokenizer.model_max_length - 2)
    assert_same(oracle(IMAGES[0], long, truncation=True, **SHORT), oracle(IMAGES[0], fits, **SHORT))
    (cut,) = captioner(IMAGES[0], prompt=long, truncation=True, **SHORT)
    (expected,) = captioner(IMAGES[0], prompt=fits, **SHORT)
    # The prompt selects the patches, and stands before the caption in full.
    caption = expected["generated_text"].removeprefix(fits.rstrip())
    assert cut["generated_text"] == long.rstrip() + caption


def test_data_sets_of_datasets_are_data_sets(oracle, captioner):
    dataset = Dataset.from_dict({"image": IMAGES, "question": QUESTIONS}, features=PICTURES)
    stream = oracle(dataset, batch_size=2, top_k=1, **SHORT)
    assert not isinstance(stream, list)
    for answers, image, question in zip(stream, IMAGES, QUESTIONS, strict=True):
        assert_same(answers, oracle(image, question, top_k=1, **SHORT))
    for answers, image in zip(oracle(dataset["image"], "red?", top_k=1, **SHORT), IMAGES, strict=True):
        assert_same(answers, oracle(image, "red?", top_k=1, **SHORT))
    captions = list(captioner(dataset["image"], batch_size=2, **SHORT))
    assert captions == captioner(IMAGES, **SHORT)
