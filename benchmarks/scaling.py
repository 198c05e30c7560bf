"""Memory, time and bytes of an edit: what the formulas say, beside what is measured on one model.

    python -m benchmarks.scaling [NAME ...] [--model smollm2] [--dtype bfloat16] [--device cuda]

Numbers of steps are small and fixed (no early stop), so that both sides count the same. Seconds follow from two
plain forward passes on the same machine; on a CPU they are those of one thread. Memory is that of tensors, as the
profiler counts it on a CPU, and the allocator on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import formulas
from benchmarks.cost import Cost, Shape, Text, size
from benchmarks.shapes import SHAPES, RandomModel
from benchmarks.side_by_side import corpus
from corrigenda.datamodules.facts import Facts
from corrigenda.datamodules.records import Edit, EditCase
from corrigenda.modules.editing.editor import Editor, editing_mode
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.grace import GRACE
from corrigenda.modules.editors.ike import IKE
from corrigenda.modules.editors.ke import KE
from corrigenda.modules.editors.kn import KN
from corrigenda.modules.editors.lora import LoRA
from corrigenda.modules.editors.malmen import MALMEN
from corrigenda.modules.editors.memit import MEMIT
from corrigenda.modules.editors.mend import MEND
from corrigenda.modules.editors.rome import ROME
from corrigenda.modules.editors.value_search import ValueEditor
from corrigenda.modules.editors.wise import WISE
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.statistics.moments import Moments
from corrigenda.modules.training.learned import LearnedEditor

HEADER = (
    "| predicted / measured | held | peak of an edit | kept | file | seconds |\n"
    "| --- | --- | --- | --- | --- | --- |\n"
)
STEPS = 8
EDITS = 4  # measured one by one
RANK = 64  # of a learned editor
CONTEXTS = [(5, 5)]


@dataclass
class Memory:
    """Bytes of tensors: at the largest moment, and at the end."""

    peak: int = 0
    left: int = 0


@contextmanager
def memory(device: torch.device) -> Iterator[Memory]:
    """Inside, tensors that are made or freed are counted; the result is filled at the end."""
    gc.collect()  # what nobody uses any more must not be freed inside
    found = Memory()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found.peak = torch.cuda.max_memory_allocated() - before
        found.left = torch.cuda.memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        yield found
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            found.left += event.nbytes()
            found.peak = max(found.peak, found.left)


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of the GPU or, on a CPU, of the processor, which other programs do not add to."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------- the model and its texts


def shape_of(lm: LanguageModel) -> Shape:
    structure = lm.structure
    return Shape.of(
        lm.net.config, structure.inner_width, len(structure.in_projs), lm.net.dtype, structure.tied
    )


def text_of(lm: LanguageModel, edits: Sequence[Edit], contexts: Sequence[str] = ()) -> Text:
    """Mean lengths of the edits' texts, and of the contexts before them."""
    rows = lm.tokens.rows([e.text for e in edits], [e.target_new for e in edits])
    subject = [lm.tokens.subject_end(edit) for edit in edits]
    whole, answer = rows.length_B.tolist(), (rows.length_B - rows.start_B).tolist()
    before = [len(lm.tokens.encode([context])[0]) for context in contexts if context]
    mean = statistics.fmean
    after = mean(n - 1 - s for n, s in zip(whole, subject, strict=True))
    return Text(mean(whole), after, mean(answer), sum(before) / max(1, len(contexts)))


@dataclass(frozen=True)
class Speed:
    """What a plain forward pass says of a machine: operations per second, and seconds of a pass of one token."""

    rate: float
    pause: float

    @classmethod
    def of(cls, lm: LanguageModel, shape: Shape) -> Speed:
        """From 16 texts of 24 tokens, and from a single token, which waits for the weights to be read."""

        @torch.no_grad()
        def run(ids_BT: torch.Tensor) -> float:
            ids_BT = ids_BT.to(lm.device)
            network = lm.net.get_decoder()
            work = partial(network, input_ids=ids_BT, use_cache=False)
            return statistics.median(seconds(lm.device, work) for _ in range(9))

        many = torch.arange(16 * 24).view(16, 24) % 300 + 5
        pause = run(many[:1, :1]) / shape.layers
        beyond = max(run(many) / shape.layers - pause, 1e-9)
        return cls(2 * many.numel() * shape.block / beyond, pause)


# ---------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Trial:
    """A method as it is measured: how it is made, its cost by the formulas, how many edits are made together."""

    name: str
    make: Callable[[], Editor]
    cost: Callable[[Text], Cost]
    together: int = 1
    trains: bool = False  # a training step is measured, not an edit


def trials(lm: LanguageModel, shape: Shape) -> list[Trial]:
    """Every method on one model: low blocks for locate-then-edit, high ones for memories and learned editors."""
    depth, text = shape.layers, corpus(lm)
    low, high = depth // 10, 4 * depth // 5
    spread = list(range(max(0, low - 3), low + 1))
    search = {"steps": STEPS, "contexts": CONTEXTS, "corpus": text}
    rows = 1 + sum(count for _, count in CONTEXTS)

    def found(kind: Callable[..., ValueEditor], **where: Any) -> Callable[[], Editor]:  # noqa: ANN401
        def make() -> Editor:
            editor = kind(**where, **search)
            editor.settings = replace(editor.settings, stop_loss=0.0)
            return editor

        return make

    def memit(edits: int) -> Callable[[Text], Cost]:
        return lambda t: formulas.memit(shape, t, spread, edits, STEPS, rows)

    pairs = formulas.attention(shape)
    return [
        Trial("ROME", found(ROME, layer=low), lambda t: formulas.rome(shape, t, low, STEPS, rows)),
        Trial("MEMIT", found(MEMIT, layers=spread, ridge=0.1), memit(1)),
        Trial("MEMIT, 10 edits", found(MEMIT, layers=spread, ridge=0.1), memit(10), 10),
        Trial("KN", lambda: KN(points=STEPS, contexts=CONTEXTS),
              lambda t: formulas.neurons(shape, t, STEPS, rows)),
        Trial("FT-M", lambda: FT([low], steps=STEPS, stop_loss=0.0),
              lambda t: formulas.fine_tuned(shape, t, low, STEPS)),
        Trial("LoRA", lambda: LoRA(steps=STEPS, stop_loss=0.0),
              lambda t: formulas.lora(shape, t, depth, pairs, steps=STEPS)),
        Trial("MEND", lambda: MEND(lm, rank=RANK), lambda t: formulas.mend(shape, t, rank=RANK)),
        Trial("MEND, a training step", lambda: MEND(lm, rank=RANK),
              lambda t: formulas.mend_step(shape, t, rank=RANK), trains=True),
        Trial("KE", lambda: KE(lm, condition=RANK), lambda t: formulas.ke(shape, t, condition=RANK)),
        Trial("MALMEN, 8 edits", lambda: MALMEN(lm, rank=RANK),
              lambda t: formulas.malmen(shape, t, rank=RANK, edits=8), 8),
        Trial("GRACE", lambda: GRACE(high, epsilon=1.0, steps=STEPS, stop_loss=0.0),
              lambda t: formulas.grace(shape, t, high, STEPS)),
        Trial("WISE", lambda: WISE(high, steps=STEPS, stop_loss=0.0, contexts=CONTEXTS, unit=1.0),
              lambda t: formulas.wise(shape, t, high, STEPS, rows)),
        Trial("IKE, 2 edits, first questions", lambda: IKE(Facts()),
              lambda t: formulas.in_context(shape, t, edits=2), 2),
    ]  # fmt: skip


# ---------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measured:
    """As :class:`~benchmarks.formulas.Cost`, in bytes and seconds."""

    held: float
    peak: float
    kept: float
    disk: float
    seconds: float


def measure(lm: LanguageModel, trial: Trial, cases: Sequence[EditCase]) -> tuple[Measured, Text]:
    """What a method needs for the first few edits, each made on the unedited model and removed again."""
    groups = [
        [case.edits[0] for case in cases[n : n + trial.together]]
        for n in range(0, EDITS * trial.together, trial.together)
    ][: EDITS if trial.together == 1 else 1]
    with editing_mode():
        _prepared(lm, trial.make(), cases)  # what is read from files afterwards
        with memory(lm.device) as before:
            editor = _prepared(lm, trial.make(), cases)
    peaks, kept, times, files = [], [], [], []
    for edits in groups:
        times.append(
            seconds(lm.device, lambda edits=edits: _made(lm, editor, edits).remove())  # type: ignore[misc]
        )
        with memory(lm.device) as during:
            handle = _made(lm, editor, edits)
        peaks.append(during.peak)
        kept.append(during.left)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "edit.safetensors"
            handle.save(path)
            files.append(path.stat().st_size)
        handle.remove()
        del handle  # what it holds must not be freed while the next edit is measured
    contexts = getattr(editor, "_contexts", ())
    text = text_of(lm, [edit for group in groups for edit in group], contexts)
    mean = statistics.fmean
    return Measured(
        before.left, mean(peaks), mean(kept), mean(files), statistics.median(times)
    ), text


def measure_step(
    lm: LanguageModel, trial: Trial, cases: Sequence[EditCase]
) -> tuple[Measured, Text]:
    """What a training step of a learned editor needs for one case, whose texts are new."""
    with memory(lm.device) as before:
        editor = cast(LearnedEditor, _prepared(lm, trial.make(), cases))
    learned = [p for p in editor.parameters() if p.requires_grad]
    adam = torch.optim.Adam(learned)

    def step(case: EditCase) -> None:
        outer, local = (case.probes[name][0] for name in ("generality", "unrelated"))
        edit_loss, kl = editor._losses([case.edits[0]], [outer], [local])
        (edit_loss + kl).backward()
        adam.step()
        adam.zero_grad()

    with memory(lm.device) as during:
        step(cases[0])
    times = [seconds(lm.device, partial(step, case)) for case in cases[1 : 1 + EDITS]]
    with tempfile.NamedTemporaryFile() as file:
        torch.save([learned, adam.state_dict()], file.name)
        length = Path(file.name).stat().st_size
    found = Measured(before.left, during.peak, during.left, length, statistics.median(times))
    return found, text_of(lm, [case.edits[0] for case in cases[: 1 + EDITS]])


def _prepared(lm: LanguageModel, editor: Editor, cases: Sequence[EditCase]) -> Editor:
    if isinstance(editor, ValueEditor):
        Moments(lm, editor.corpus).gather(getattr(editor, "layers", None) or [editor.layer])  # type: ignore[attr-defined]
    if isinstance(editor, LearnedEditor):
        editor.observe(cases[:16])
    editor.prepare(lm)
    return editor


def _made(lm: LanguageModel, editor: Editor, edits: Sequence[Edit]) -> Any:  # noqa: ANN401
    """The handle of an edit; an edit in context costs only with its first query, which is made here."""
    handle = editor.edit(lm, edits)
    if isinstance(editor, IKE):
        lm.score([edit.text for edit in edits], [edit.target_new for edit in edits])
    return handle


def rows(
    lm: LanguageModel, cases: Sequence[EditCase], names: Sequence[str] = ()
) -> Iterator[tuple[Trial, Cost, float, Measured]]:
    """(method, its cost, seconds by the formulas, what was measured) of every method or of those named."""
    shape = shape_of(lm)
    speed = Speed.of(lm, shape)
    for trial in trials(lm, shape):
        if names and trial.name.partition(",")[0] not in names:
            continue
        found, text = (measure_step if trial.trains else measure)(lm, trial, cases)
        cost = trial.cost(text)
        yield trial, cost, cost.seconds(shape, speed.rate, speed.pause), found


def line(trial: Trial, cost: Cost, time: float, found: Measured) -> str:
    """One row of the table."""
    cells = [
        f"{size(getattr(cost, name))} / {size(getattr(found, name))}"
        for name in ("held", "peak", "kept", "disk")
    ]
    return f"| {trial.name} | {' | '.join(cells)} | {time:.2g} / {found.seconds:.2g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="methods; all by default")
    shapes = f"as for corrigenda, or {', '.join(SHAPES)} with random weights"
    parser.add_argument("--model", default="smollm2", help=shapes)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind = RandomModel if args.model in SHAPES else LanguageModel
    lm = kind(args.model, dtype=args.dtype, device=args.device)
    shape = shape_of(lm)
    where = "one thread" if lm.device.type == "cpu" else torch.cuda.get_device_name(lm.device)
    speed = Speed.of(lm, shape)
    sys.stderr.write(f"{args.model}, {args.dtype}, {where}, {speed.rate / 1e9:.0f} GFLOP/s, "
                     f"{1e3 * speed.pause:.2g} ms for a block's weights\n")  # fmt: skip
    sys.stdout.write(HEADER)
    for row in rows(lm, Facts().cases("test"), args.names):
        sys.stdout.write(f"{line(*row)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
