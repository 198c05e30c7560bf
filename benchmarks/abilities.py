"""Multiple-choice tasks: lm-evaluation-harness's own HFLM, or our bridge, on the same rows of the profile fast.

The rows are read from ``../shared/data/tasks`` beside the project; without that folder nothing is timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from lm_eval.models.huggingface import HFLM

from benchmarks.side_by_side import ratio, require_close
from corrigenda.datamodules.records import EditCase
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.pipeline.abilities.bridge import EditedModel
from corrigenda.pipeline.abilities.harness_tasks import load_task, quiet

DATA = Path(__file__).parents[2] / "shared" / "data" / "tasks"
TASKS = ("rte", "boolq", "sst2", "mutual", "cola", "mrpc")
QUESTIONS = 40  # of the 200 in the profile
BATCH_SIZE = 8  # of HFLM; larger ones are slower on a CPU


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    if not DATA.is_dir():
        return
    lm.reuse.enabled = True
    with quiet():
        theirs = HFLM(pretrained=lm.net, tokenizer=lm.tokenizer, batch_size=BATCH_SIZE)
    ours = EditedModel(lm)
    for name in TASKS:
        task = load_task(name, "strict", "fast", DATA)
        rows = task.dataset["validation"]
        task.dataset["validation"] = rows.select(range(min(QUESTIONS, len(rows))))
        with quiet():
            task.build_all_requests()
        expected = theirs.loglikelihood(task.instances, disable_tqdm=True)
        found = ours.loglikelihood(task.instances)
        worst = max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True))
        require_close(lm, worst, 1e-2)
        yield ratio(
            f"{name}, {len(task.dataset['validation'])} questions",
            partial(theirs.loglikelihood, task.instances, disable_tqdm=True),
            partial(ours.loglikelihood, task.instances),
            rounds,
        )
