"""What the writer is asked: the instructions, and the requests for a storyboard or for one prompt."""

Message = dict[str, str]

STYLE = (
    "A video prompt is one paragraph of 25 to 100 words in English, in the present tense, for a clip of "
    "six seconds in one shot without cuts. It names the subject and how it looks, its movement, the "
    "setting, the light, and the camera. It has no dialogue, no written text, and no sound."
)
STORY = (
    "You write storyboards for an image model and a video model. "
    + STYLE
    + " An image prompt is one or two sentences in English that describe the first frame of the clip: "
    "subject, setting, light and framing, without movement. The models see one scene at a time and know "
    "nothing of the others: describe each person, object and place completely and in the same words in "
    "every scene where it appears. Keep everything that the idea says, in its order, and add nothing "
    "that contradicts it.\n\n"
    'The request gives an idea and a number of scenes. Answer only with JSON of this form: {"scenes": '
    '[{"title": "two to five words", "prompt": "the video prompt", "image_prompt": "the image '
    'prompt"}]}, with exactly that number of scenes.'
)
PROMPT = (
    "You improve prompts for a video model. "
    + STYLE
    + " Keep everything that the given prompt says and contradict none of it; add only what it leaves "
    "open. Translate it if it is in another language. A prompt that already says all of this stays as "
    "it is.\n\n"
    'Answer only with JSON of this form: {"prompt": "the improved prompt"}.'
)
EXAMPLES = (
    (
        "Prompt: a girl on the beach",
        '{"prompt": "A young girl in a yellow summer dress walks barefoot along a wide sandy beach at '
        "sunset. Small waves wash over her feet and the wind moves her hair. Warm orange light reflects "
        'on the wet sand. The camera follows her slowly from the side at eye level."}',
    ),
    (
        "Prompt: eine alte Dampflok im Gebirge",
        '{"prompt": "An old black steam locomotive pulls three green carriages along a narrow track in '
        "the mountains. White steam rises from its chimney and drifts over the pine trees. Snow lies on "
        'the peaks under a clear morning sky. The camera pans slowly with the train."}',
    ),
)


def story_request(idea: str, scenes: int) -> str:
    return f"Idea: {idea}\nScenes: {scenes}"


def prompt_request(prompt: str) -> str:
    return f"Prompt: {prompt}"


def story_messages(idea: str, scenes: int) -> list[Message]:
    """Return the conversation that asks for a storyboard."""
    return [_message("system", STORY), _message("user", story_request(idea, scenes))]


def prompt_messages(prompt: str) -> list[Message]:
    """Return the conversation that asks for one better prompt."""
    examples = "\n\n".join(f"{asked}\n{answer}" for asked, answer in EXAMPLES)
    return [
        _message("system", f"{PROMPT}\n\nExamples:\n\n{examples}"),
        _message("user", prompt_request(prompt)),
    ]


def with_correction(messages: list[Message], answer: str, problem: str) -> list[Message]:
    """Return the conversation that asks again, with what was wrong."""
    request = f"That cannot be used: {problem}. Answer again, only with JSON of the form above."
    return [*messages, _message("assistant", answer), _message("user", request)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
