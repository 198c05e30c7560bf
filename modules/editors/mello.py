"""MeLLo: multi-hop questions with a memory of edited facts (Zhong et al., 2023, arXiv 2305.14795).

The model decomposes a question and checks itself: it writes a sub-question and a tentative answer, the most
similar edited fact is appended, and it states whether that contradicts its answer and which intermediate answer it
uses; then it writes the next sub-question or the final answer. Four worked questions show how:

    Question: <the question>
    Subquestion: <its first step>                                                   the model writes
    Generated answer: <what the model believes>                                     the model writes
    Retrieved fact: <the edited fact most like the sub-question>                    looked up
    The retrieved fact contradicts ..., so the intermediate answer is: <an answer>  the model writes
    ...
    Final answer: <the answer>                                                      the model writes

A round is what the model writes between two look-ups; a question of h steps needs h + 1 rounds. The beginning of a
round's first line is fixed, so it is given: small models lose the format without it. A question that is still open
after the last round, or whose lines do not have this format, has no answer and is counted. The look-up always
finds a fact; whether it is relevant is for the model to decide.

The published protocol has no teacher-forced scores. Here they are taken at the position of the final answer, even
for a question that was left open.

Departures from the authors' code: demonstrations of our own; look-up by cosine with the encoder of the other
methods (theirs is ``facebook/contriever-msmarco``, unnormalised); if the context is too short the first
demonstrations are left out; a round's first words are given, and it also ends if the model goes on to
check an answer without the look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from corrigenda.datamodules.records import Edit
from corrigenda.modules import checks
from corrigenda.modules.editing.memory import MemoryEditor, MemoryPatch, sentence
from corrigenda.modules.model.handle import EditHandle, GenerationRequest, Request, ScoreRequest
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import TargetScores
from corrigenda.modules.retrieval.retriever import Encoder

QUESTION, STEP, BELIEF = "Question:", "Subquestion:", "Generated answer:"
FACT, ANSWER = "Retrieved fact:", "Final answer:"
CHECK = "The retrieved fact"
AGREES = f"{CHECK} does not contradict the generated answer, so the intermediate answer is:"
DISAGREES = f"{CHECK} contradicts the generated answer, so the intermediate answer is:"
STOP = (FACT, f"\n{CHECK}", "\n\n", f"\n{QUESTION}")  # each ends a round

DEMONSTRATIONS = [
    f"""{QUESTION} In which city was the author of "War and Peace" born?
{STEP} Who is the author of "War and Peace"?
{BELIEF} The author of "War and Peace" is Leo Tolstoy.
{FACT} The author of "War and Peace" is Victor Hugo.
{DISAGREES} Victor Hugo
{STEP} In which city was Victor Hugo born?
{BELIEF} Victor Hugo was born in Besancon.
{FACT} Victor Horta worked in the city of Dublin.
{AGREES} Besancon
{ANSWER} Besancon

""",
    f"""{QUESTION} Which currency is used in the country where Mount Fuji stands?
{STEP} In which country does Mount Fuji stand?
{BELIEF} Mount Fuji stands in Japan.
{FACT} Mount Kenya is located in Norway.
{AGREES} Japan
{STEP} Which currency is used in Japan?
{BELIEF} The currency of Japan is the yen.
{FACT} The currency of Japan is the Swiss franc.
{DISAGREES} Swiss franc
{ANSWER} Swiss franc

""",
    f"""{QUESTION} Who is the head of government of the country where curling was invented?
{STEP} In which country was curling invented?
{BELIEF} Curling was invented in Scotland.
{FACT} Curling was invented in New Zealand.
{DISAGREES} New Zealand
{STEP} Who is the head of government of New Zealand?
{BELIEF} The head of government of New Zealand is Jacinda Ardern.
{FACT} The head of government of New Zealand is Angela Merkel.
{DISAGREES} Angela Merkel
{ANSWER} Angela Merkel

""",
    f"""{QUESTION} On which continent lies the country whose citizen founded the company that makes the iPhone?
{STEP} Which company makes the iPhone?
{BELIEF} The company that makes the iPhone is Apple.
{FACT} The company that makes the Walkman is Nestle.
{AGREES} Apple
{STEP} Who founded Apple?
{BELIEF} Apple was founded by Steve Jobs.
{FACT} Apple was founded by Wangari Maathai.
{DISAGREES} Wangari Maathai
{STEP} Of which country is Wangari Maathai a citizen?
{BELIEF} Wangari Maathai is a citizen of Kenya.
{FACT} Kenya shares a border with Portugal.
{AGREES} Kenya
{STEP} On which continent does Kenya lie?
{BELIEF} Kenya lies in Africa.
{FACT} Kenya shares a border with Portugal.
{AGREES} Africa
{ANSWER} Africa

""",
]


@dataclass
class Reasoning:
    """The state of one question.

    Attributes:
        question: the prompt.
        lines: the reasoning so far.
        answer: the final answer, once there is one.
        failed: the model's lines did not have the required format.
    """

    question: str
    lines: str = ""
    answer: str | None = None
    failed: bool = False

    @property
    def is_open(self) -> bool:
        return self.answer is None and not self.failed

    @property
    def text(self) -> str:
        """Question and lines, as they stand in the prompt."""
        return f"{QUESTION} {self.question}\n{self.lines}"

    @property
    def cue(self) -> str:
        """The given beginning of the next round's first line."""
        return CHECK if self.lines else STEP

    def read(self, written: str) -> str | None:
        """Adds what the model wrote after the cue; returns the sub-question to look up, if there is one."""
        lines = [line.strip() for line in f"{self.cue}{written}".splitlines() if line.strip()]
        for number, line in enumerate(lines):
            if line.startswith(ANSWER):
                self.answer = line.removeprefix(ANSWER).strip()
                lines = lines[:number]
                break
        self.lines += "".join(f"{line}\n" for line in lines)
        has_step = len(lines) > 1 and lines[-2].startswith(STEP) and lines[-1].startswith(BELIEF)
        self.failed = self.answer is None and not has_step
        return lines[-2].removeprefix(STEP).strip() if has_step and self.answer is None else None


class SelfChecked(MemoryPatch):
    """Answers questions by sub-questions, each checked against the memory."""

    editor: MeLLo

    def __init__(self, editor: MemoryEditor, lm: LanguageModel, edits: Sequence[Edit]) -> None:
        self._done: dict[str, Reasoning] = {}
        self._beside: list[EditHandle] = []
        super().__init__(editor, lm, edits)

    def score(self, request: ScoreRequest) -> TargetScores:
        texts = [f"{reasoning.text}{ANSWER}" for reasoning in self._reason(request)]
        lengths = self.target_lengths(request.targets)
        prompts = [
            self.shown(DEMONSTRATIONS, text, reserve)
            for text, reserve in zip(texts, lengths, strict=True)
        ]
        with self.lm.reuse.common_prefix():
            return self.lm.score_request(replace(request, prompts=prompts))

    def generate(self, request: GenerationRequest) -> list[str]:
        """The final answers, empty if there is none; ``round_tokens`` applies, not ``max_new_tokens``."""
        return [reasoning.answer or "" for reasoning in self._reason(request)]

    def _reason(self, request: Request) -> list[Reasoning]:
        """The reasoning about each question, done once and used for scores and generated answers alike."""
        if request.deltas:
            return self._work_out(request)
        if self._beside != self.lm.handles:  # other edits may change what the model writes
            self._beside, self._done = list(self.lm.handles), {}
        new = [prompt for prompt in dict.fromkeys(request.prompts) if prompt not in self._done]
        self._done |= zip(new, self._work_out(Request(prompts=new)), strict=True)
        return [self._done[prompt] for prompt in request.prompts]

    def _work_out(self, request: Request) -> list[Reasoning]:
        reasonings = [Reasoning(prompt.strip()) for prompt in request.prompts]
        for _ in range(self.editor.rounds):
            still = [n for n, reasoning in enumerate(reasonings) if reasoning.is_open]
            if not still:
                break
            with self.lm.reuse.common_prefix():
                self._round([reasonings[n] for n in still], request.select(still))
        self.editor.counts["questions"] += len(reasonings)
        self.editor.counts["format_failures"] += sum(reasoning.failed for reasoning in reasonings)
        self.editor.counts["out_of_rounds"] += sum(reasoning.is_open for reasoning in reasonings)
        return reasonings

    def _round(self, reasonings: Sequence[Reasoning], request: Request) -> None:
        room = self.editor.round_tokens
        prompts = [
            self.shown(DEMONSTRATIONS, f"{reasoning.text}{reasoning.cue}", room)
            for reasoning in reasonings
        ]
        written = self.lm.generate(prompts, room, request.deltas, request.owners, stop=STOP)
        steps = [
            (reasoning, step)
            for reasoning, text in zip(reasonings, written, strict=True)
            if (step := reasoning.read(text)) is not None
        ]
        if steps:
            found = self.nearest([step for _, step in steps])
            for (reasoning, _), (edit, _) in zip(steps, found, strict=True):
                reasoning.lines += f"{FACT} {sentence(edit, self.lm.tokens.separator)}.\n"


class MeLLo(MemoryEditor):
    """Stores edits as text and lets the model check each step of its reasoning against them.

    Made for questions. Set ``--model.generate_tokens`` for the published protocol, which evaluates the generated
    final answers (``wild_*``).

    Args:
        rounds: rounds at most; a question needs one more than it has steps.
        round_tokens: tokens of a round at most.
        encoder: finds the facts: ``minilm``, another sentence encoder's hub id or folder, or ``lm`` for the
            language model's own hidden states.
    """

    patch = SelfChecked

    def __init__(
        self, rounds: int = 4, round_tokens: int = 96, encoder: str | Encoder = "minilm"
    ) -> None:
        super().__init__(encoder)
        checks.whole(1, rounds=rounds, round_tokens=round_tokens)
        self.rounds, self.round_tokens = rounds, round_tokens

    def key(self, edit: Edit) -> str:
        return sentence(edit)
