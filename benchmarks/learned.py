"""A training step of MEND: through the whole network, or with cached states of the frozen blocks.

The reference step is that of the authors' code (arXiv 2110.11309): the edit's loss is backpropagated through the
whole network, with a gradient for every weight, and every pass runs all blocks, and the head on all tokens. New
texts are those of a first epoch, whose states are computed once for all passes of the step and cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.side_by_side import ratio, require_close
from corrigenda.datamodules.records import EditCase
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.model.hooks import capture
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.rows import Rows
from corrigenda.modules.model.tail import Tail


def rows(lm: LanguageModel, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    last = lm.structure.num_layers
    lm.reuse.limits = replace(lm.reuse.limits, disk_gib=0)
    for layers in ([last - n for n in (6, 5, 4, 3)], [last - n for n in (3, 2, 1)]):
        editor = MEND(lm, layers)
        editor.observe(cases)
        for count in (1, 8):
            yield from _steps(editor, cases[:count], rounds)
    lm.reuse.drop()


def _steps(editor: MEND, cases: Sequence[EditCase], rounds: int) -> Iterator[str]:
    lm, layers = editor.lm, editor.layers
    chosen = ([case.edits[0] for case in cases], [case.probes["generality"][0] for case in cases],
              [case.probes["unrelated"][0] for case in cases])  # fmt: skip

    def step() -> tuple[list[float], Tensor]:
        """The losses, and their gradient with respect to the editor's weights."""
        editor.zero_grad()
        edit_loss, kl = editor._losses(*chosen)
        (edit_loss + kl).backward()
        gradients = [p.grad.flatten() for p in editor.parameters() if p.grad is not None]
        return [edit_loss.item(), kl.item()], torch.cat(gradients)

    def reference() -> tuple[list[float], Tensor]:
        lm.reuse.enabled = False
        with patch("corrigenda.modules.editors.mend.gradient_factors", backward_through_all):
            return step()

    def ours(new: bool) -> tuple[list[float], Tensor]:
        lm.reuse.enabled = True
        if new:
            lm.reuse.keep(layers[0], lm.structure.num_layers)
        return step()

    expected, gradient = reference()
    for losses, same in (ours(new=True), ours(new=False)):
        errors = [abs(a - b) / max(1.0, abs(a)) for a, b in zip(expected, losses, strict=True)]
        require_close(lm, max(errors), 1e-4)
        require_close(lm, ((gradient - same).norm() / gradient.norm()).item(), 1e-4)
    edits = "1 edit" if len(cases) == 1 else f"{len(cases)} edits"
    for new, texts in ((True, "new"), (False, "cached")):
        name = f"MEND on blocks {layers[0]} to {layers[-1]}, a step of {edits}, {texts} texts"
        yield ratio(name, reference, lambda new=new: ours(new), rounds)  # type: ignore[misc]


def backward_through_all(
    lm: LanguageModel, _tail: Tail, rows: Rows, names: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The result of :func:`corrigenda.modules.training.gradients.gradient_factors`, from ``loss.backward()``."""
    row_N, position_N = rows.answer_positions()
    target_N = rows.ids_BT[row_N, position_N + 1]
    weight_N = 1 / (rows.length_B - rows.start_B)[row_N]
    lm.net.requires_grad_(requires_grad=True)
    with torch.enable_grad(), capture({n: lm.net.get_submodule(n) for n in names}) as seen:
        logits_BTV = lm.net(input_ids=rows.ids_BT, attention_mask=rows.mask_BT).logits
        for _, output_BTO in seen.values():
            output_BTO.retain_grad()
        nll_N = cross_entropy(logits_BTV[row_N, position_N].float(), target_N, reduction="none")
        (nll_N * weight_N).sum().backward()
    lm.net.requires_grad_(requires_grad=False)
    lm.net.zero_grad()
    return {name: (seen[name][0].detach(), seen[name][1].grad) for name in names}
