"""MeLLo: the loop of sub-questions, what counts as an answer, and what does not."""

import pytest
import torch

from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors import mello
from corrigenda.modules.editors.mello import DEMONSTRATIONS, MeLLo, Reasoning
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.model.handle import GenerationRequest
from corrigenda.modules.retrieval.retriever import Encoder

OWL = Edit("The owner of {} is", "the Tin Owl", "Iris Vane")
IRIS = Edit("{} was born in", "Iris Vane", "Zembla")
QUESTION = "Where was the owner of the Tin Owl born?"
STEP_1 = "Subquestion: Who is the owner of the Tin Owl?\nGenerated answer: The owner is Mira."
CHECK_1 = (
    "The retrieved fact contradicts the generated answer, so the intermediate answer is: Iris Vane"
)
STEP_2 = "Subquestion: Where was Iris Vane born?\nGenerated answer: Iris Vane was born in Rome."
CHECK_2 = (
    "The retrieved fact contradicts the generated answer, so the intermediate answer is: Zembla"
)
FINAL = "Final answer: Zembla"
AT_ONCE = f"{STEP_1}\n{FINAL}"


class Letters(Encoder):
    """Texts with the same letters are alike."""

    name = hash = "letters"

    def encode(self, texts):
        counts = [[t.lower().count(chr(c)) + 0.01 for c in range(97, 123)] for t in texts]
        return torch.nn.functional.normalize(torch.tensor(counts), dim=-1)


def after_cue(written):
    """What the model writes of a round whose beginning it is given."""
    for cue in ("Subquestion:", "The retrieved fact"):
        written = written.removeprefix(cue)
    return written


class Script:
    """Stands in for the model: answers each prompt by what its own question's transcript ends with.

    Rounds are given whole; it leaves out the words that it is given.
    """

    def __init__(self, *rounds):
        self.rounds, self.prompts, self.owners, self.stop = rounds, [], [], None

    def __call__(self, prompts, max_new_tokens, deltas=None, owners=None, stop=(), **_):
        self.prompts.append(list(prompts))
        self.owners.append(owners)
        self.stop = stop
        number = len(self.prompts) - 1
        said = self.rounds[number]
        return [after_cue(said if isinstance(said, str) else said(p)) for p in prompts]


@pytest.fixture
def lm(tiny_lm):
    return tiny_lm("gpt2", max_position_embeddings=8192)


def edited(lm, monkeypatch, *rounds, **settings):
    """(editor, handle, script) with two active facts; the script answers instead of the model."""
    editor = MeLLo(encoder=Letters(), **settings)
    handle = editor.edit(lm, [OWL, IRIS])
    script = Script(*rounds)
    monkeypatch.setattr(lm, "generate", script)
    return editor, handle, script


def test_a_question_goes_through_its_steps(lm, monkeypatch):
    rounds = (f"{STEP_1}\n", f"{CHECK_1}\n{STEP_2}\n", f"{CHECK_2}\n{FINAL}")
    editor, handle, script = edited(lm, monkeypatch, *rounds)
    assert handle.generate(GenerationRequest(prompts=[QUESTION], max_new_tokens=5)) == ["Zembla"]
    begin = "".join(DEMONSTRATIONS) + f"Question: {QUESTION}\n"
    first = begin + f"{STEP_1}\nRetrieved fact: The owner of the Tin Owl is Iris Vane.\n"
    second = first + f"{CHECK_1}\n{STEP_2}\nRetrieved fact: Iris Vane was born in Zembla.\n"
    assert script.prompts == [
        [f"{begin}Subquestion:"],
        [f"{first}The retrieved fact"],
        [f"{second}The retrieved fact"],
    ]
    assert set(script.stop) == {"Retrieved fact:", "\nThe retrieved fact", "\n\n", "\nQuestion:"}
    numbers = editor.numbers()
    assert (numbers["questions"], numbers["format_failures"], numbers["out_of_rounds"]) == (1, 0, 0)
    assert numbers["demonstrations_left_out"] == 0


@pytest.mark.parametrize(("rounds", "expected"), [(4, 4), (2, 2), (1, 1)])
def test_it_stops_after_the_last_round(lm, monkeypatch, rounds, expected):
    written = (STEP_1, *[f"{CHECK_1}\n{STEP_1}"] * 8)
    editor, handle, script = edited(lm, monkeypatch, *written, rounds=rounds)
    assert handle.generate(GenerationRequest(prompts=[QUESTION], max_new_tokens=5)) == [""]
    assert len(script.prompts) == expected
    assert editor.numbers()["out_of_rounds"] == 1 and editor.numbers()["format_failures"] == 0


def test_four_rounds_are_the_default():
    assert MeLLo().rounds == 4


@pytest.mark.parametrize(
    "written",
    ["", "\n\n", " Iris Vane was born in Zembla.", " Who?", "\nGenerated answer: Mira\nMira",
     "\nGenerated answer: Mira\nSubquestion: Who?", " Who?\nMira", " Who?\nWho?\nGenerated answer: Mira"],
)  # fmt: skip
def test_lines_of_another_form_are_a_counted_failure(lm, monkeypatch, written):
    editor, handle, script = edited(lm, monkeypatch, written)
    assert handle.generate(GenerationRequest(prompts=[QUESTION], max_new_tokens=5)) == [""]
    assert len(script.prompts) == 1 and editor.numbers()["format_failures"] == 1


def test_questions_are_worked_out_side_by_side(lm, monkeypatch):
    def second(prompt):
        rome = FINAL.replace("Zembla", "Rome")
        return f"{CHECK_1}\n{STEP_2}" if QUESTION in prompt else f"{CHECK_2}\n{rome}"

    def first(prompt):
        return STEP_1 if "sea" not in prompt.split("Question:")[-1] else " The sea is deep"

    _, handle, script = edited(lm, monkeypatch, first, second, f"{CHECK_2}\n{FINAL}")
    prompts = ["Why is the sea deep?", QUESTION, "Who owns it?", QUESTION]
    assert handle.generate(
        GenerationRequest(prompts=prompts, max_new_tokens=5, owners=[0, 0, 0, 0])
    ) == ["", "Zembla", "Rome", "Zembla"]
    assert [len(part) for part in script.prompts] == [3, 2, 1], (
        "one of each question, open ones only"
    )


def test_what_follows_the_final_answer_does_not_count():
    reasoning = Reasoning(QUESTION, f"{STEP_2}\nRetrieved fact: Iris Vane was born in Zembla.\n")
    before = reasoning.lines
    written = f"{CHECK_2}\n Final answer:  Zembla \nSubquestion: a?\nGenerated answer: b"
    assert reasoning.read(after_cue(written)) is None
    assert (reasoning.answer, reasoning.failed, reasoning.is_open) == ("Zembla", False, False)
    assert reasoning.lines == f"{before}{CHECK_2}\n"


def test_scores_are_taken_where_the_final_answer_belongs(lm, monkeypatch):
    rounds = (STEP_1, f"{CHECK_1}\n{FINAL}")
    _, _, script = edited(lm, monkeypatch, *rounds)
    found = lm.score([QUESTION, QUESTION], ["Zembla", "Rome"])
    text = (
        "".join(DEMONSTRATIONS)
        + f"Question: {QUESTION}\n{STEP_1}\nRetrieved fact: The owner of the Tin Owl is Iris Vane.\n{CHECK_1}\n"
        + "Final answer:"
    )
    with lm.pristine():
        plain = lm.score([text, text], ["Zembla", "Rome"])
    torch.testing.assert_close(found.logprob_BM, plain.logprob_BM, rtol=0, atol=1e-4)
    before = len(script.prompts)
    lm.score([QUESTION], ["Paris"])
    assert len(script.prompts) == before, "the reasoning about a question is cached"


def test_another_edit_has_questions_worked_out_again(lm, monkeypatch):
    _, handle, script = edited(lm, monkeypatch, *[AT_ONCE] * 3)
    handle.generate(GenerationRequest(prompts=[QUESTION], max_new_tokens=5))
    handle.generate(GenerationRequest(prompts=[QUESTION], max_new_tokens=5))
    assert len(script.prompts) == 1
    name = lm.structure.out_name(0) + ".weight"
    patch = WeightPatch(lm, Delta({name: torch.zeros(32, lm.net.get_parameter(name).shape[0])}))
    handle.generate(GenerationRequest(prompts=[QUESTION], max_new_tokens=5))
    assert len(script.prompts) == 2
    patch.remove()
    handle.generate(GenerationRequest(prompts=[QUESTION], max_new_tokens=5))
    assert len(script.prompts) == 3


def test_deltas_of_rows_reach_every_round(lm, monkeypatch):
    _, handle, script = edited(
        lm, monkeypatch, lambda p: AT_ONCE if "Question: one?" in p else STEP_1, AT_ONCE
    )
    handle.generate(
        GenerationRequest(
            prompts=["one?", "two?"], max_new_tokens=5, deltas=["left", "right"], owners=[1, 0]
        )
    )
    assert script.owners == [[1, 0], [0]]


def test_a_short_context_loses_demonstrations_first(tiny_lm, monkeypatch):
    lm = tiny_lm("gpt2", max_position_embeddings=900)
    editor, handle, script = edited(lm, monkeypatch, AT_ONCE, round_tokens=40)
    handle.generate(GenerationRequest(prompts=[QUESTION], max_new_tokens=5))
    (prompt,) = script.prompts[0]
    assert (
        prompt.endswith(f"Question: {QUESTION}\nSubquestion:") and prompt.count("Final answer:") < 4
    )
    assert len(lm.tokens.encode([prompt])[0]) + 40 <= 900
    left = prompt.count("Final answer:")
    assert editor.numbers()["demonstrations_left_out"] == len(DEMONSTRATIONS) - left > 0


def test_the_demonstrations_are_of_the_form_that_is_read():
    for demonstration in DEMONSTRATIONS:
        question, *rest = demonstration.rstrip("\n").split("\n")
        reasoning = Reasoning(question.removeprefix("Question: "))
        *rounds, last = "\n".join(rest).split("Retrieved fact:")
        first, *others = rounds
        for written in (first, *(text.split("\n", 1)[1] for text in others)):
            assert reasoning.read(after_cue(written)) is not None
        checked = [line for line in rest if line.startswith("The retrieved fact")]
        assert len(checked) == len(rounds)
        assert all(line.startswith((mello.AGREES, mello.DISAGREES)) for line in checked)
        final = last.split("\n", 1)[1]
        assert final.startswith(reasoning.cue)
        reasoning.read(after_cue(final))
        assert reasoning.answer == checked[-1].rsplit(": ", 1)[1]
        assert demonstration.endswith("\n\n")


def test_answers_are_evaluated_as_free_text(lm, monkeypatch):
    """A case of three wordings: one is answered with an alias, one wrongly, one not at all."""
    written = {
        "Where?": " Where?\nFinal answer: the Isle of Zembla.",
        "Whence?": " Where?\nFinal answer: Rome",
        QUESTION: " No idea.",
    }

    def write(_patch, reasonings, _request):
        for reasoning in reasonings:
            reasoning.read(written[reasoning.question])

    monkeypatch.setattr(mello.SelfChecked, "_round", write)
    editor = MeLLo(encoder=Letters())
    handle = editor.edit(lm, [OWL, IRIS])
    questions = tuple(Probe(prompt, "Zembla", "Rome", ("Isle of Zembla",)) for prompt in written)
    hops = (Probe("Where?", "Zembla"), Probe("Whence?", "Rome"))
    (result,) = EditingModule(lm, generate_tokens=6).evaluate(
        [EditCase("1", (OWL, IRIS), {"multihop": questions, "hops": hops})]
    )
    assert result.metrics["multihop/wild_exact"] == pytest.approx(1 / 3)
    assert result.metrics["multihop/any_wild_exact"] == 1
    assert result.metrics["hops/wild_exact"] == 0.5 and result.metrics["hops/all_wild_exact"] == 0
    assert result.metrics["hops/all_wild_contains"] == 1
    assert editor.numbers()["questions"] == 3 and editor.numbers()["format_failures"] == 1
    handle.remove()
