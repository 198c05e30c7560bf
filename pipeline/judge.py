"""``corrigenda judge``: has a language model judge whether freely generated answers are right.

The judge is any endpoint that speaks the protocol of OpenAI's chat completions. It reads the question, the right
answer and the given one, at temperature 0 (as in WILD, arXiv 2502.11177).
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from corrigenda.modules import checks
from corrigenda.modules.files import locked, remove_unfinished, write_text
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report.runs import read_run
from corrigenda.pipeline.report.verdicts import FILE, Answer, answers, read_verdicts
from corrigenda.pipeline.run_folder import LOCK

SAVE_EVERY = 20  # verdicts
PROMPT = """\
You check the answers of a language model.

Question: {question}
Right answer: {gold}
Given answer: {said}

The given answer is correct if it states the right answer, in these words or in others, and nothing that \
contradicts it. It is incorrect if it states something else, repeats itself without end, or does not answer.
Reply with one word: correct or incorrect."""


@dataclass(frozen=True)
class Judge:
    """A language model behind an endpoint.

    Args:
        url: up to the version, such as ``http://localhost:8000/v1``.
        model: its name there.
        key: sent as a bearer token if given.
        timeout: seconds to wait for an answer.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 60.0

    def judge(self, answer: Answer) -> dict[str, Any]:
        """The line of ``judged.jsonl`` for an answer; a reply that is neither word counts as incorrect."""
        prompt = PROMPT.format(**answer._asdict())
        reply = self._request(prompt)
        words = re.findall(r"[a-z]+", reply.casefold())
        verdict = next((word for word in words if word in ("correct", "incorrect")), None)
        return {
            **answer._asdict(),
            "correct": verdict == "correct",
            "clear": verdict is not None,
            "judge": self.model,
            "prompt": prompt,
            "reply": reply,
        }

    def _request(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 16,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        where = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(where, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            raise UserError(f"the judge at {where} refuses: {error.code} {error.reason}") from None
        except OSError as error:
            raise UserError(f"the judge at {where} does not respond: {error}") from None
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"the judge at {where} gives no chat completion: {error!r}") from None


def judge(
    dirs: Sequence[Path],
    url: str,
    model: str,
    key_from: str | None = None,
    timeout: float = 60.0,
) -> None:
    """Asks a language model whether the freely generated answers of finished runs are right; resumes if killed.

    The verdicts are in judged.jsonl of each run folder, with prompts and replies; a report shows them.

    Args:
        dirs: run folders whose answers were generated (--model.generate_tokens).
        url: an OpenAI-compatible endpoint, up to the version: http://localhost:8000/v1.
        model: name of the judge there.
        key_from: environment variable that holds the key, if the endpoint wants one.
        timeout: seconds to wait for a reply.
    """
    checks.positive(timeout=timeout)
    if not re.match(r"https?://", url):
        raise UserError(f"--url must begin with http:// or https://, got {url!r}")
    key = os.environ.get(key_from) if key_from else None
    if key_from and not key:
        raise UserError(f"the environment variable {key_from!r} is not set")
    for folder in dirs:
        if not (folder / "summary.json").is_file():
            raise UserError(f"{folder} is not the folder of a finished run")
    judge_model = Judge(url, model, key, timeout)
    for folder in dirs:
        with locked(folder / LOCK, f"the run folder {folder}"):
            remove_unfinished(folder)
            _judge_run(folder, judge_model)


def _judge_run(folder: Path, judge_model: Judge) -> None:
    found = [answer for row in read_run(folder).rows for _, answer in answers(row.probes)]
    if not found:
        raise UserError(
            f"{folder} has no freely generated answers: run it with --model.generate_tokens 20"
        )
    verdicts = read_verdicts(folder)
    left = [answer for answer in dict.fromkeys(found) if answer not in verdicts]
    screen = Console(stderr=True)
    bar = Progress(console=screen, disable=not screen.is_terminal, transient=True)
    try:
        with bar:
            for number, answer in enumerate(bar.track(left, description="judged"), start=1):
                verdicts[answer] = judge_model.judge(answer)
                if number % SAVE_EVERY == 0:
                    _write(folder, verdicts)
    finally:
        if left and verdicts:
            _write(folder, verdicts)
    rows = [verdicts[answer] for answer in dict.fromkeys(found)]
    right, unclear = sum(row["correct"] for row in rows), sum(not row["clear"] for row in rows)
    sys.stdout.write(
        f"{folder}: {right} of {len(rows)} answers correct, {unclear} replies unclear\n"
    )


def _write(folder: Path, verdicts: Mapping[Answer, Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in verdicts.values()]
    write_text(folder / FILE, "".join(lines))
