"""``corrigenda edit``: changes facts in a model, and shows the answers before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from corrigenda.datamodules.own import Edits
from corrigenda.datamodules.records import EditCase
from corrigenda.modules import checks
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.pipeline.chat import talk
from corrigenda.pipeline.edit_files import refuse_existing
from corrigenda.pipeline.errors import UserError
from corrigenda.pipeline.method import build, find_settings
from corrigenda.pipeline.session import (
    Fact,
    Session,
    count,
    say,
    show,
    write,
)


def edit(
    model: str,
    lm_options: Mapping[str, Any],
    fact: Fact | None = None,
    file: str | None = None,
    editor: str = "rome",
    save: Path | None = None,
    chat: bool = False,
    tokens: int = 10,
) -> None:
    """Changes facts in a model and shows its answers before and after.

    Args:
        model: a Hub id, a folder, or smollm2.
        lm_options: options of the language model.
        fact: the fact to write.
        file: facts to write together, see docs/own-data.md; instead of a single one.
        editor: a method with the settings in configs, such as rome, memit, ike or grace; a configuration file
            (.yaml); or the checkpoint (.ckpt) of a learned editor.
        save: a file for the edits (.safetensors).
        chat: talk to the edited model.
        tokens: length of an answer in tokens.
    """
    checks.whole(1, tokens=tokens)
    if save is not None:
        refuse_existing(save, "file")
    cases = _cases(fact, file)
    settings = find_settings(editor, model)
    transformers.logging.disable_progress_bar()
    say(f"loading {model}")
    lm = LanguageModel(model, **lm_options)
    method, source = build(settings, lm)
    session = Session(lm, method, tokens)
    say(f"editing with {type(method).__name__} ({source})")
    before = session.answers(cases)
    prepared = session.prepare()
    seconds = session.edit([edit for case in cases for edit in case.edits])
    show(before, session.answers(cases))
    made = count(sum(len(case.edits) for case in cases), "edit")
    once = f", after {prepared:.1f} s for what the first edit needs" if prepared >= 0.1 else ""
    write(f"{made} in {seconds:.1f} s{once}")
    if save is not None:
        session.save(save)
        write(f"saved in {save}")
    if chat:
        talk(session)


def _cases(fact: Fact | None, file: str | None) -> list[EditCase]:
    if (fact is None) == (file is None):
        raise UserError(
            "give either one fact with --prompt, --subject and --target, or --file with several"
        )
    return Edits(file).cases("test") if fact is None else [fact.case()]
