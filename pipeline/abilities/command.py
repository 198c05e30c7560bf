"""``corrigenda abilities``: tasks of lm-evaluation-harness on a model with saved edits."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corrigenda.modules.editing.adapters import MEMORY_FORMAT, ModulePatch
from corrigenda.modules.editing.memory import FORMAT as MEMORY_OF_EDITS
from corrigenda.modules.editing.memory import MemoryEditor
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.files import locked, read_metadata, remove_unfinished
from corrigenda.modules.model.delta import FORMAT as DELTA
from corrigenda.modules.model.delta import Delta, file_format
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.pipeline.abilities.answers import AnswerFiles
from corrigenda.pipeline.abilities.questions import Questions, model_id
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.report.records import parse

HEADERS = {DELTA: "delta", MEMORY_FORMAT: "metadata", MEMORY_OF_EDITS: "memory"}  # by format


def abilities(
    tasks: Sequence[str],
    out: Path,
    lm_options: Mapping[str, Any],
    edits: Sequence[Path] = (),
    editor: MemoryEditor | None = None,
    **rest: Any,  # noqa: ANN401
) -> None:
    """Evaluates a model on tasks of lm-evaluation-harness, without and then with saved edits; resumes if killed.

    Args:
        tasks: names of tasks; ours are gsm8k, rte, nq_open, boolq, mutual, samsum, conll2003, sst2, cola, mrpc.
        out: folder for abilities.jsonl and the answers; what is answered there is not evaluated again.
        lm_options: options of the language model; its default name is that in the files.
        edits: files of edits (.safetensors), all active together, applied in this order.
        editor: for files of a text memory (IKE, MemPrompt, MeLLo, SERAC): the editor that wrote them.
    """
    questions = Questions(tasks, **rest)
    names = [_metadata(file, editor).get("model") for file in edits]
    name = lm_options.get("name") or next(filter(None, names), "smollm2")
    _ = questions.tasks  # rows that are missing end the command before a model is loaded
    lm = LanguageModel(**{**lm_options, "name": name})
    count = sum(_apply(lm, file, editor) for file in edits)
    with locked(out / ".lock", f"the folder {out}"):
        remove_unfinished(out)
        files = AnswerFiles(out)
        with lm.pristine():
            _show(questions, lm, files, 0, model_id(lm))
        if edits:
            _show(questions, lm, files, count, model_id(lm, map(_digest, edits)))


def _show(
    questions: Questions, lm: LanguageModel, files: AnswerFiles, count: int, model: str
) -> None:
    """Evaluates what is left, and prints a line for each task."""
    for row in questions.evaluate(lm, files, count, model, progress=True):
        if row["task"] == questions.names[0]:
            _print(f"{count} edits, perplexity of plain text {row['perplexity']:.4g}")
        _print(f"  {row['task']:10} {row['metric']:12} {row['score']:.3f} ± {row['stderr']:.3f}  "
               f"invalid {row['invalid']:.3f}  n {row['n']}  {row['seconds']:.1f} s")  # fmt: skip


def _metadata(file: Path, editor: MemoryEditor | None) -> dict[str, Any]:
    """What a file of edits says of itself; raises UserError for other files, and without a memory's editor."""
    header = read_metadata(file)
    kind = header.get("format", "")
    if kind not in HEADERS:
        raise UserError(f"{file} is not a file of edits that this project wrote")
    try:
        found = parse(header[HEADERS[kind]])
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: damaged: {error}") from None
    if kind == MEMORY_OF_EDITS and editor is None:
        raise UserError(
            f"{file} is a text memory of {found.get('editor')}: give that editor with --editor"
        )
    return found


def _apply(lm: LanguageModel, file: Path, editor: MemoryEditor | None) -> int:
    """Activates the edits of a file; returns how many they are, or 1 if it does not list them."""
    kind = file_format(file)
    if kind == MEMORY_OF_EDITS and editor is not None:
        return len(editor.restore(lm, file).edits)
    if kind == MEMORY_FORMAT:
        metadata = ModulePatch.load(lm, file).metadata
    else:
        metadata = WeightPatch(lm, Delta.load(file)).delta.metadata
    return len(metadata.get("edits", [])) or 1


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
