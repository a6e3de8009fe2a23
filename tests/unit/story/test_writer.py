"""The writer's answers are checked and asked for again; prompts are cut at a sentence."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from lib.cancellation import Stopped
from lib.errors import UserError
from lib.story.writer import TOKENS_PER_SCENE, TRIES, Writer, cut_at_sentence
from lib.weights.checkpoints import locate

SCENE = {"title": "One", "prompt": "a red circle moves", "image_prompt": "a red circle"}
GOOD = json.dumps({"scenes": [SCENE, SCENE]})


class Scripted:
    """A language model that gives prepared answers, and keeps what it was asked."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.asked, self.limits = tokenizer, list(answers), [], []
        self.device, self.config = torch.device("cpu"), SimpleNamespace(max_position_embeddings=100_000)

    def generate(self, *, input_ids, max_new_tokens, stopping_criteria, **_):
        self.asked.append(self.tokenizer.decode(input_ids[0]))
        self.limits.append(max_new_tokens)
        stopping_criteria(input_ids, torch.zeros(1, 1))
        answer = self.tokenizer(self.answers.pop(0), return_tensors="pt")["input_ids"][:, :max_new_tokens]
        return torch.cat([input_ids, answer], dim=1)


@pytest.fixture(scope="module")
def tokenizer():
    found = AutoTokenizer.from_pretrained(locate("tiny-writer"))
    # Unlike tiny-writer's, which leaves out all but the first request.
    found.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    return found


def writer(tokenizer, *answers) -> Writer:
    return Writer(model=Scripted(tokenizer, answers), tokenizer=tokenizer, report=lambda line: None)


def scenes(found: Writer, count=2, stop=None, longest=50):
    return found.write_scenes(
        "an idea", count, seed=1, count_tokens=lambda text: len(text.split()), longest=longest, stop=stop
    )


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        f"Here is your storyboard:\n```json\n{GOOD}\n```\nEnjoy!",
        GOOD.replace("moves", "<i>moves</i>\\n"),
        json.dumps({"scenes": [{**SCENE, "notes": "x"}] * 2, "mood": "calm"}),
    ],
)
def test_a_usable_answer_is_taken(tokenizer, answer):
    found = writer(tokenizer, answer)
    assert [scene.prompt for scene in scenes(found)] == ["a red circle moves"] * 2
    [asked] = found.model.asked
    assert "Idea: an idea\nScenes: 2" in asked and "Answer only with JSON" in asked


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("blah blah", "there is no JSON object in it"),
        (GOOD[:60], "its JSON is damaged or ends too early"),
        ('{"scenes": [' + "[" * 5000, "its JSON is damaged or ends too early"),
        ('{"scene": []}', 'it has no list "scenes"'),
        (json.dumps({"scenes": [SCENE]}), "it has 1 scenes instead of 2"),
        (json.dumps({"scenes": [SCENE, {**SCENE, "prompt": " "}]}), "scene 2 has no prompt"),
        (json.dumps({"scenes": [SCENE, "x"]}), "scene 2 is not an object"),
        ("a red circle " * 4000, "there is no JSON object in it"),
    ],
)
def test_a_wrong_answer_is_asked_for_again_with_what_was_wrong(tokenizer, answer, problem):
    found = writer(tokenizer, answer, GOOD)
    assert len(scenes(found)) == 2
    assert f"That cannot be used: {problem}." in found.model.asked[1]
    assert found.model.limits == [2 * TOKENS_PER_SCENE] * 2


def test_after_three_wrong_answers_the_error_says_why(tokenizer):
    found = writer(tokenizer, *["nonsense"] * (TRIES + 1))
    with pytest.raises(UserError, match=r"3 answers that cannot be used \(the last one: there is no JSON"):
        scenes(found)
    assert len(found.model.answers) == 1


def test_writing_stops_between_two_tokens(tokenizer):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        scenes(writer(tokenizer, GOOD), stop=stop)


def test_the_seed_does_not_change_the_global_generator(tokenizer):
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    scenes(writer(tokenizer, GOOD))
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize(
    ("text", "longest", "kept"),
    [
        ("One two. Three four. Five six.", 6, "One two. Three four. Five six."),
        ("One two. Three four. Five six.", 5, "One two. Three four."),
        ("one two three four five", 4, "one two three"),
    ],
)
def test_a_long_prompt_is_cut_at_a_sentence_or_a_word(text, longest, kept):
    assert cut_at_sentence(text, lambda part: len(part.split()), longest) == kept


def test_a_detailed_prompt_is_left_alone_and_a_short_one_grows(tokenizer):
    found = writer(tokenizer, '{"prompt": "a red circle rolls over snow"}')
    options = {"seed": 1, "count_tokens": lambda text: len(text.split()), "longest": 20}
    assert found.enhance("one two three four five six seven eight", **options).startswith("one two")
    assert found.enhance("red circle", **options) == "a red circle rolls over snow"
    assert len(found.model.asked) == 1
