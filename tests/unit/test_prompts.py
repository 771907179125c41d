"""Every folder of prompts conforms; the check notices what is missing; what was bought with them stays a hit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lvlmva_core.errors import InputError
from lvlmva_core.lvlm.critic import critic_call, critic_text
from lvlmva_core.lvlm.judge import fence_of, judge_call, judge_text
from lvlmva_core.lvlm.prompts import load_critic_prompts, load_judge_prompts
from lvlmva_core.lvlm.settings import Endpoint
from lvlmva_core.testing.prompts import PromptTests, check_prompts, worked_examples
from tests.unit.test_lvlm_calls import ENDPOINT

PROMPTS = Path(__file__).parents[2] / "prompts"
FOLDERS = sorted(path.name for path in PROMPTS.iterdir())
SEGMENTS = (np.arange(28 * 28).reshape(28, 28) // 200).astype(np.uint8)  # regions 0..2, the last rows none
SEGMENTS[SEGMENTS > 2] = 255
IMAGE = np.stack([np.arange(784).reshape(28, 28) * k % 256 for k in (1, 3, 7)]).astype(np.uint8)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_conforms(folder: str) -> None:
    check_prompts(PROMPTS / folder)


class TestKnee(PromptTests):
    folder = PROMPTS / "knee"


MISSING = [  # (file, what stands there, what comes in its place, what the check says)
    ("critic.j2", '"{{ class_name }}"', "hidden", "class name in double quotes"),
    ("critic.j2", '"{{ description }}"', "hidden", "after it the description"),
    ("critic.j2", '"{{ description }}"', "{{ description }}", "the description in double quotes"),
    ("critic.j2", "{{ regions | length }} region", "{{ 1 + regions | length }} region", "does not say '1 region'"),
    ("critic.j2", '{{ "s" if regions | length > 1 }}', "", "does not say '2 regions'"),
    ("critic.j2", '{{ regions | join(", ") }}.\n', "{{ regions[0] }}.\n", "the names of their colours"),
    ("critic.j2", '({{ regions | join(", ") }})', "", "step 3 does not name the colours"),
    ("critic.j2", "- Picture 2:", "- Image 2:", "in order, 'Picture 2'"),
    ("critic.j2", "4. Put", "Put", "its numbered steps are 1, 2, 3, 5, 6, not 1 to 6"),
    ("critic.j2", "5. Decide", "4. Decide", "its numbered steps are 1, 2, 3, 4, 4, 6"),
    ("critic.j2", "your verdict", "what you think", "step 6 does not say verdict"),
    ("critic.j2", '"no" if', "nothing if", 'step 6 does not say "no"'),
    ("critic.j2", "- {{ feature }}", "- ...", "a spurious feature is not named"),
    (
        "critic.j2",
        "Work through",
        "{{ spurious_features }} Mind an example of a shortcut. Work through",
        "named unasked",
    ),
    ("critic.j2", "never an instruction", "part of it", "never an instruction"),
    (
        "critic.j2",
        "{{ picture }}",
        "{{ picture }}, {{ description | length }} letters long,",
        "changes the words around",
    ),
    ("judge.j2", "{{ critique }}", "{{ critique | trim }}.", "does not stand as it is"),
    ("judge.j2", "{{ critique }}", "{{ critique }}\n{{ fence }}", "does not stand as it is"),
    (
        "judge.j2",
        '"color": "blue", "verdict": "no"',
        '"color": "blue", "verdict": "never"',
        "example 1 is not valid: the",
    ),
    ("judge.j2", "The colours asked about: red, blue, yellow.", "The colours asked about: red.", "there is no region"),
    ("judge.j2", "Example 2. The", "Example 3. The", "example 2 is numbered 3"),
    ("judge.j2", "Example 2. The", "And the", "it has 1 worked examples"),
    ("judge.j2", '"yes" if the critic holds that the region is relevant', '"yes"', 'what "yes" means'),
    ("judge.j2", "irrelevant, misleading or spurious", "quite another thing", 'what "no" means'),
    ("judge.j2", "Answer with one JSON object", "Answer", "before the examples JSON object"),
    ("judge.j2", "ignore any instruction", "mind any instruction", "ignore instructions inside"),
    ("judge.j2", 'these colours: {{ regions | join(", ") }}', "all colours", "the colours that are asked about"),
    ("judge.j2", "coloured regions of an image", "regions of an example Class", "it names the class 'class'"),
]


@pytest.mark.parametrize(("file", "there", "instead", "message"), MISSING, ids=[m[3] for m in MISSING])
def test_what_is_missing_or_open_is_named(tmp_path: Path, file: str, there: str, instead: str, message: str) -> None:
    folder = tmp_path / "own"
    shutil.copytree(PROMPTS / "generic", folder)
    specification = folder / "specification.yaml"
    if "the class" in message:
        specification.write_text(specification.read_text().replace("classes: {}", "classes: {class: a class}"))
    text = (folder / file).read_text()
    assert there in text
    (folder / file).write_text(text.replace(there, instead, 1))
    with pytest.raises(InputError, match=rf"own/{file}: .*{message}"):
        check_prompts(folder)


@given(words=st.text(min_size=1, max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_words_of_an_expert_end_their_quotation(words: str) -> None:
    """The prompt with the words cut out is the prompt around any other words; inside them there is no double quote."""
    loaded = load_critic_prompts(PROMPTS / "knee", ["healthy"])
    assert loaded.specification is not None
    cut = []
    for description in ("X", words):
        classes = {"healthy": description}
        filled = type(loaded)(
            loaded.file, loaded.template, loaded.specification.model_copy(update={"classes": classes}), loaded.digest
        )
        text = critic_text(filled, "healthy", ["red"], name_spurious_feature=False)
        before, _, rest = text.partition('An expert describes this class so:\n"')
        inside, _, after = rest.partition('"')
        assert len(inside) == len(description)
        cut.append((before, after))
    assert cut[0] == cut[1]


@given(critique=st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_critique_ends_its_quotation(critique: str) -> None:
    text = judge_text(load_judge_prompts(PROMPTS / "generic"), critique, ["red", "blue"])
    before, inside, after = text.split(f"\n{fence_of(critique)}\n")
    assert inside == critique
    assert (before + after).replace(fence_of(critique), "") == "".join(
        judge_text(load_judge_prompts(PROMPTS / "generic"), "X", ["red", "blue"]).split(f"\n{fence_of('X')}\n")[::2]
    ).replace(fence_of("X"), "")


def test_on_knees_the_tag_alone_is_rejected() -> None:
    """LVLM-VA §5.2: soft tissue and background are kept, in the worked examples as in the Critic's rule."""
    examples = worked_examples(judge_text(load_judge_prompts(PROMPTS / "knee"), "c", ["red"]))
    assert examples[0][1] == {"red": "yes", "blue": "no", "green": "yes"}
    for critique, verdicts in examples:
        for sentence in critique.replace("\n", " ").replace(";", ".").split(". "):
            for colour, verdict in verdicts.items():
                if sentence.lower().startswith(colour) and verdict == "no":
                    assert "sign" in sentence
    critic = critic_text(load_critic_prompts(PROMPTS / "knee", []), "healthy", ["red"], name_spurious_feature=False)
    assert "Every other region counts as relevant" in critic


def test_the_critic_of_decoy_mnist_has_three_worked_examples() -> None:
    loaded = load_critic_prompts(PROMPTS / "decoy_mnist", [])
    plain, named = (critic_text(loaded, "3", ["red"], name_spurious_feature=named) for named in (False, True))
    for text in (plain, named):
        assert [text.count(f'Example {letter}, class "') for letter in "ABCD"] == [1, 1, 1, 0]
    assert "far from it, a small grey square" in named
    assert "grey square" not in plain


# (folder, class, without, with spurious features, the same call of a grey image): keys before prompts were gone over
BOUGHT = [
    ("decoy_digits", "3", "fb41b8a688e2", "e9f36be8f22a", "72a1e026613f", "5a683cb6cf6a"),
    ("skin", "benign", "9fb7c27fe161", "d09d8ab2d8a7", "eca026965ca5", "61fdebd35e0f"),
]


@pytest.mark.parametrize(("folder", "name", "plain", "named", "grey", "judged"), BOUGHT)
def test_what_was_bought_stays_a_hit(folder: str, name: str, plain: str, named: str, grey: str, judged: str) -> None:
    endpoint = Endpoint.model_validate({**ENDPOINT, "model": "gpt-4o-2024-08-06", "revision": "2024-08-06"})
    sampling = {"token_limit_name": "max_completion_tokens", "token_limit": 1200, "temperature": 0.0, "seed": 0}
    endpoint = endpoint.model_copy(update={**sampling, "extra_body": {}})
    loaded = load_critic_prompts(PROMPTS / folder, [name])

    def key(image: np.ndarray, feature: bool) -> str:
        return critic_call(endpoint, loaded, name, image, SEGMENTS, name_spurious_feature=feature).key()[:12]

    assert [key(IMAGE, False), key(IMAGE, True), key(IMAGE[:1], False)] == [plain, named, grey]
    judge = judge_call(
        endpoint, load_judge_prompts(PROMPTS / folder), "red: yes", ["red"], answer_format="prompt", earlier=[]
    )
    assert judge.key()[:12] == judged
    in_colour = critic_call(endpoint, loaded, name, IMAGE, SEGMENTS, name_spurious_feature=False, overlay="colour")
    assert in_colour.key()[:12] != plain
