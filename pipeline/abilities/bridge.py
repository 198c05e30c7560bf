"""A language model under its active edits, as a model of lm-evaluation-harness.

Everything goes through :meth:`LanguageModel.score` and :meth:`LanguageModel.generate`, so edits of all kinds are
active, also those that rewrite prompts or answer in the model's place. Texts are encoded as the harness encodes
them (:meth:`Tokens.as_written`), so that the answers are those of its own ``HFLM``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import Progress

from corrigenda.modules.model.lm import LanguageModel

AT_ONCE = 64  # pairs that are scored in one call
MOST_TOKENS = 256  # of an answer, if a task sets no limit; the harness has the same


class EditedModel(TemplateLM):
    """A language model for the harness.

    Args:
        lm: the model; its active edits apply.
        batch_size: texts that are continued together.
        progress: whether a bar shows how far it is.

    Attributes:
        num_truncated: contexts that were cut at their beginning to fit into the model's context.
    """

    def __init__(self, lm: LanguageModel, batch_size: int = 32, progress: bool = False) -> None:
        super().__init__()
        self.lm, self.batch_size, self.progress = lm, batch_size, progress
        self.tokenizer = lm.tokenizer
        self.num_truncated = 0
        self._screen = Console(file=sys.stderr)  # also while the harness's own bars are not shown

    # ------------------------------------------------------------------ what the harness calls

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether it is the greedy one) of each continuation of a context."""
        return self._score([request.args for request in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each text, in windows of the model's context, cut between characters."""
        pieces = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._score([piece for text in pieces for piece in text]))
        return [sum(next(scores)[0] for _ in text) for text in pieces]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to the texts to stop at or the end token."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        texts = [""] * len(requests)
        with self._bar() as bar:
            bar.add_task("answers", total=len(requests))
            for options, places in groups.items():
                contexts = [requests[place].args[0] for place in places]
                answers = self._generate(contexts, json.loads(options), bar)
                for place, text in zip(places, answers, strict=True):
                    texts[place] = text
        return texts

    @property
    def eot_token_id(self) -> int:
        return self.lm.tokens.end_token

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **_: Any,  # noqa: ANN401
    ) -> list[int]:
        return self.lm.tokens.encode([string])[0]

    def _loglikelihood_tokens(self, *_: Any, **__: Any) -> list[tuple[float, bool]]:  # noqa: ANN401
        raise NotImplementedError("texts are scored, not tokens")

    # ------------------------------------------------------------------ how it is answered

    def _score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """The pairs' scores; pairs of one context run together, as a tree, and similar lengths in one call."""
        pairs = [self._fitting(context or self._start, target) for context, target in pairs]
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), pairs[i]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with self._bar() as bar:
            bar.add_task("scores", total=len(pairs))
            for begin in range(0, len(order), AT_ONCE):
                places = order[begin : begin + AT_ONCE]
                prompts, targets = zip(*(pairs[i] for i in places), strict=True)
                with self.lm.reuse.shared(0), self.lm.tokens.as_written():
                    scores = self.lm.score(prompts, targets)
                sums = scores.logprob_BM.sum(1).tolist()
                for i, *score in zip(places, sums, scores.exact_B.tolist(), strict=True):
                    found[i] = score[0], score[1]
                bar.advance(bar.task_ids[0], len(places))
        return found

    def _bar(self) -> Progress:
        """How far it is, on a terminal."""
        shown = self.progress and self._screen.is_terminal
        return Progress(console=self._screen, disable=not shown, transient=True)

    def _generate(
        self, contexts: Sequence[str], options: dict[str, Any], bar: Progress
    ) -> Iterator[str]:
        given = normalize_gen_kwargs(options, MOST_TOKENS)
        if given.get("do_sample"):
            raise ValueError(
                "the task samples its answers (do_sample), and answers here are greedy: leave it out"
            )
        most, limit = given["max_gen_toks"], self.lm.max_length
        if limit is not None and most >= limit:
            raise ValueError(
                f"the task wants answers of up to {most} tokens, and the context of {self.lm.name!r} has {limit}, "
                "prompt included: choose a model with a longer context, or another task"
            )
        prompts = [self._cut(context, most) for context in contexts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts = [""] * len(prompts)
        for begin in range(0, len(order), self.batch_size):
            places = order[begin : begin + self.batch_size]
            with self.lm.tokens.as_written():
                answers = self.lm.generate(
                    [prompts[i] for i in places],
                    most,
                    batch_size=self.batch_size,
                    stop=[text for text in given["until"] if text],
                )
            for i, text in zip(places, answers, strict=True):
                texts[i] = text
            bar.advance(bar.task_ids[0], len(places))
        return iter(texts)

    @property
    def _start(self) -> str:
        """What stands before a text that has no context: a begin-of-text token, or else an end token."""
        if self.lm.tokens.encode([""])[0]:
            return ""  # the tokenizer puts one there itself
        return str(self.tokenizer.bos_token or self.tokenizer.eos_token)

    def _fitting(self, context: str, target: str) -> tuple[str, str]:
        """The pair, with the beginning of its context cut off where both are too long for the model."""
        whole = self._cut(context + target, 0)
        return context[len(context) + len(target) - len(whole) :], target

    def _cut(self, text: str, reserve: int) -> str:
        """The end of a text that leaves room for ``reserve`` tokens."""
        limit = self.lm.max_length
        if limit is None or len(text.encode()) + reserve < limit:  # no token is shorter than a byte
            return text
        before = text
        while (more := len(self.tok_encode(text)) + reserve - limit) > 0:
            starts = self.tokenizer(text, return_offsets_mapping=True).offset_mapping
            text = text[max(starts[min(more, len(starts) - 1)][0], 1) :]
        self.num_truncated += text != before
        return text

    def _windows(self, text: str) -> Iterator[tuple[str, str]]:
        """(context, continuation) of each window of a text."""
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        places = list(range(len(encoded.input_ids)))
        starts = [start for start, _ in encoded.offset_mapping] + [len(text)]
        width = (self.lm.max_length or len(places) + 1) - 1
        for window in get_rolling_token_windows(places, -1, width, 1):
            context, inside = make_disjoint_window(window)
            before = text[starts[context[0]] : starts[inside[0]]] if context[0] >= 0 else ""
            yield before, text[starts[inside[0]] : starts[inside[-1] + 1]]
