"""Methods against forgetting: what they penalise, what they keep of earlier tasks, and interrupted runs."""

import copy
from collections import Counter

import pytest
import torch
from lightning.pytorch import Trainer
from transformers.pytorch_utils import Conv1D

from corrigenda.datamodules.base import EditDataModule
from corrigenda.datamodules.records import Edit, EditCase, Probe
from corrigenda.datamodules.tasks import Tasks
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.ewc import EWC
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.editors.full import FullFT
from corrigenda.modules.editors.l2sp import L2SP, squared_norm
from corrigenda.modules.editors.locft import LocFT
from corrigenda.modules.editors.lora import LoRA
from corrigenda.modules.editors.lwf import LwF
from corrigenda.modules.editors.replay import Replay
from corrigenda.modules.editors.task_lora import OLoRA, TaskLoRA
from corrigenda.modules.model.delta import Delta, LowRank, add_deltas
from corrigenda.modules.model.handle import EditHandle
from corrigenda.modules.model.lm import LanguageModel
from corrigenda.modules.model.loading import hash_weights
from corrigenda.modules.training import tuning
from corrigenda.modules.training.tuning import FineTune
from corrigenda.pipeline import checkpointing
from tests.samples import QUIET

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

EDITS = [
    Edit("The capital of {} is", "Ruritania", "Strelsau"),
    Edit("{} was written by", "The Voyage Out", "Iris Vane"),
    Edit("The language of {} is called", "the Glass Islands", "Old High Fenwick"),
    Edit("{} plays the", "Ada", "oboe"),
    Edit("The owner of {} is", "the Tin Owl", "Mira Stone"),
    Edit("{} lies in", "Port Larch", "Zembla"),
]
CASES = [
    EditCase(str(n), (edit,), {"efficacy": (Probe(edit.text, edit.target_new, "the sea"),)})
    for n, edit in enumerate(EDITS)
]
PROMPTS, TARGETS = [e.text for e in EDITS], [e.target_new for e in EDITS]


class Stream(EditDataModule):
    def cases(self, split):
        return CASES


@pytest.fixture
def lm(tiny_lm):
    return tiny_lm("gpt2")


def ft(**rest):
    return FT([1], lr=5e-3, **rest)


def stream(number=2, size=2, passes=2, batch_size=1, **rest):
    return Stream(batch_size=batch_size, tasks=Tasks(number, size, passes=passes, **rest))


def train(module, folder, data=None, epochs=2, **rest):
    trainer = Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, max_epochs=epochs, **rest,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(module, data or stream())
    return trainer


def moved(module, size=0.02):
    """The module with something learned."""
    with torch.no_grad():
        for leaf in module.learned.values():
            leaf += size * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(7))
    return module


def rows_of(module, rows=slice(None)):
    return module.target_rows(PROMPTS[rows], TARGETS[rows])


def penalty(module):
    """(the penalty on all edits, its gradients)."""
    rows = rows_of(module)
    logits_KV = rows.logits(module.lm, [module.update()], *module.also_read(rows))
    value = module.penalty(rows, logits_KV)
    return value, gradients(value, module)


def gradients(value, module):
    found = torch.autograd.grad(value, list(module.learned.values()), allow_unused=True)
    return [
        torch.zeros_like(leaf) if g is None else g
        for g, leaf in zip(found, module.learned.values(), strict=True)
    ]


def learned(module):
    return {name: leaf.detach().clone() for name, leaf in module.learned.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------- the loop


class Noted(FineTune):
    """Notes what happens in which order."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.notes = []

    def begin_task(self, cases):
        self.notes.append(("begin", [case.case_id for case in cases]))

    def end_task(self, cases):
        self.notes.append(("end", [case.case_id for case in cases]))

    def training_step(self, batch, batch_idx):
        self.notes.append(("step", [case.case_id for case in batch]))
        return super().training_step(batch, batch_idx)


def test_tasks_begin_and_end_once_around_their_steps(lm, tmp_path):
    module, data = Noted(lm, ft()), stream(number=3)
    train(module, tmp_path, data, epochs=3)
    kinds = [kind for kind, _ in module.notes]
    assert kinds == ["begin", *["step"] * 4, "end"] * 3
    for number, cases in enumerate(data.tasks.cases):
        ids = [case.case_id for case in cases]
        begin, *steps, end = module.notes[6 * number : 6 * number + 6]
        assert begin[1] == end[1] == ids
        assert sorted(sum((ids for _, ids in steps), [])) == sorted(2 * ids)


def test_a_joint_run_is_one_task(lm, tmp_path):
    module = Noted(lm, ft())
    train(module, tmp_path, stream(number=3, joint=True), epochs=1)
    assert [len(ids) for kind, ids in module.notes if kind != "step"] == [6, 6]


def test_without_tasks_nothing_begins(lm, tmp_path):
    module = Noted(lm, ft())
    train(module, tmp_path, Stream(batch_size=2))
    assert {kind for kind, _ in module.notes} == {"step"}


def test_every_task_starts_with_a_fresh_optimizer_and_schedule(lm, tmp_path):
    optimizers = []

    def optimizer(parameters):
        optimizers.append(torch.optim.SGD(parameters, lr=0.1))
        return optimizers[-1]

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    module = FineTune(lm, ft(), optimizer, scheduler=scheduler)
    train(module, tmp_path, stream(number=3), epochs=3)
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.1 * 0.5**4] * 3


def test_a_task_can_have_an_empty_batch(lm, monkeypatch):
    monkeypatch.setattr(FineTune, "batches_per_pass", 2)
    module = FineTune(lm, ft())
    before = learned(module)
    assert module.training_step([], 0) is None and same(learned(module), before)


METHODS = {
    "EWC": lambda lm: EWC(lm, ft(), strength=1e3),
    "online EWC": lambda lm: EWC(lm, ft(), strength=1e3, gamma=0.9),
    "L2SP": lambda lm: L2SP(lm, ft(), to_base=0.1, to_last=0.5),
    "LwF": lambda lm: LwF(lm, ft(), answers=True),
    "Replay": lambda lm: Replay(lm, ft(), rows=1),
    "TaskLoRA": lambda lm: TaskLoRA(lm, LoRA([1], lr=5e-2)),
    "OLoRA": lambda lm: OLoRA(lm, LoRA([1], lr=5e-2)),
    "LocFT": lambda lm: LocFT(lm, ft()),
    "FullFT": lambda lm: FineTune(lm, FullFT(lr=1e-3)),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=list(METHODS))


@every_method
def test_a_method_learns_the_last_task_and_leaves_the_base_alone(lm, make, tmp_path):
    before = {name: p.clone() for name, p in lm.net.named_parameters()}
    module, data = make(lm), stream(passes=4)
    train(module, tmp_path, data)
    last = [case.edits[0] for case in data.tasks.cases[-1]]
    texts, targets = [e.text for e in last], [e.target_new for e in last]
    beside = lm.score(texts, targets, [module.own_delta()]).logprob_BM.sum()
    assert beside > lm.score(texts, targets).logprob_BM.sum() + 0.2
    assert all(torch.equal(p, before[name]) for name, p in lm.net.named_parameters())
    assert module.trained


@every_method
def test_a_checkpoint_has_everything_that_was_kept(tiny_lm, make, tmp_path):
    module = make(tiny_lm("gpt2"))
    trainer = train(module, tmp_path)
    path = tmp_path / "one.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert not any(name.startswith("lm.") for name in saved["state_dict"])
    again = make(tiny_lm("gpt2"))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(again, stream(), path, verbose=False, weights_only=True)
    mine, other = (
        {k: v for k, v in m.state_dict().items() if not k.startswith("lm.")}
        for m in (module, again)
    )
    assert same(mine, other)
    assert again.means == pytest.approx(module.means, abs=1e-5)


WEIGHTLESS = {
    "EWC": lambda lm: EWC(lm, ft(), strength=0),
    "L2SP": lambda lm: L2SP(lm, ft(), to_base=0, to_last=0),
    "Replay": lambda lm: Replay(lm, ft(), strength=0),
}


@pytest.mark.parametrize("weight", WEIGHTLESS.values(), ids=list(WEIGHTLESS))
def test_without_weight_it_is_plain_fine_tuning(lm, weight, tmp_path):
    plain, module = FineTune(lm, ft()), weight(lm)
    train(plain, tmp_path)
    train(module, tmp_path)
    assert same(learned(plain), learned(module))


# ---------------------------------------------------------------------------- EWC and L2-SP


def squared_gradient(module, number):
    rows = rows_of(module, slice(number, number + 1))
    nll = (rows.losses(module.lm, [module.update()]) * rows.length_R).sum()
    return [g**2 for g in gradients(nll, module)]


def test_information_is_the_mean_of_each_edits_squared_gradient(lm):
    module = moved(EWC(lm, ft()))
    (one,) = [list(module.information(EDITS[:1]).values())]
    for found, wanted in zip(one, squared_gradient(module, 0), strict=True):
        torch.testing.assert_close(found, wanted)
    each = [squared_gradient(module, n) for n in range(3)]
    found = list(module.information(EDITS[:3]).values())
    for n, information in enumerate(found):
        torch.testing.assert_close(information, torch.stack([g[n] for g in each]).mean(0))
    rows = rows_of(module, slice(3))
    nll = (rows.losses(lm, [module.update()]) * rows.length_R).mean()
    mean_gradient = gradients(nll, module)
    assert sum(map(torch.sum, found)) > 1.1 * sum((g**2).sum() for g in mean_gradient)


def test_the_gradient_is_that_of_log_p_of_the_whole_target(lm):
    module = moved(EWC(lm, ft()))
    rows, delta = rows_of(module, slice(1)), module.own_delta()
    nll = (rows.losses(lm, [delta]) * rows.length_R).sum()
    assert -nll.item() == pytest.approx(
        lm.score(PROMPTS[:1], TARGETS[:1], [delta]).logprob_BM.sum().item(), rel=1e-5
    )


def test_the_penalty_is_zero_where_the_task_ended(lm):
    module = moved(EWC(lm, ft()))
    assert module.penalty(rows_of(module), torch.empty(0)) is None  # before any task has ended
    module.end_task(CASES[:2])
    value, slopes = penalty(module)
    assert value == 0 and not any(g.any() for g in slopes)
    value, slopes = penalty(moved(module))
    assert value > 0 and any(g.any() for g in slopes)


def test_penalties_of_several_tasks_add_up(lm):
    """The gradients of the one parabola are those of one penalty for each task."""
    module, pairs = EWC(lm, ft(), strength=10.0), []
    for number in range(3):
        moved(module, 0.01 * (number + 1))
        pairs.append((module.information(EDITS[2 * number : 2 * number + 2]), learned(module)))
        module.end_task(CASES[2 * number : 2 * number + 2])
    moved(module)
    wanted = 0.0
    for fisher, anchor in pairs:
        for name, leaf in module.leaves.items():
            wanted += 5.0 * (fisher[name] * (leaf - anchor[name.replace(".", "/")]) ** 2).sum()
    for found, slope in zip(penalty(module)[1], gradients(wanted, module), strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-6 * slope.abs().max().item())


def test_online_information_decays_and_the_anchor_is_the_latest(lm):
    module = moved(EWC(lm, ft(), gamma=0.5))
    module.end_task(CASES[:2])
    first = module.fisher.tensors
    moved(module)
    module.end_task(CASES[2:4])
    new = module.information(EDITS[2:4])
    for name, total in module.fisher.tensors.items():
        torch.testing.assert_close(total, 0.5 * first[name] + new[name])
        assert torch.equal(module.anchor.tensors[name], module.leaves[name])


def test_with_equal_information_ewc_is_l2_to_the_last_task(lm):
    ewc, l2 = moved(EWC(lm, ft(), strength=3.0)), moved(L2SP(lm, ft(), to_last=3.0))
    ewc.end_task(CASES[:1]), l2.end_task(CASES[:1])
    ewc.fisher.put({name: torch.ones_like(f) for name, f in ewc.fisher.tensors.items()})
    (one, ones), (other, others) = penalty(moved(ewc)), penalty(moved(l2))
    torch.testing.assert_close(one, other)
    assert one > 0
    for a, b in zip(ones, others, strict=True):
        torch.testing.assert_close(a, b)


def test_l2sp_measures_the_weights_whatever_they_are_made_of(lm):
    lora = moved(L2SP(lm, LoRA([1]), to_base=2.0, to_last=0.0), 0.1)
    dense = lora.own_delta()
    norm = sum(dense.dense(name).norm() ** 2 for name in dense.updates)
    assert penalty(lora)[0].item() == pytest.approx(norm.item(), rel=1e-4)
    lora.to_last = 1.0
    lora.end_task([])
    assert penalty(lora)[0].item() == pytest.approx(norm.item(), rel=1e-4)  # nothing since the task
    assert squared_norm(Delta({"a": torch.ones(2, 3)})) == 6


# ---------------------------------------------------------------------------- LwF


@pytest.mark.parametrize("answers", [False, True])
def test_the_old_model_is_not_penalised(lm, answers):
    module = moved(LwF(lm, ft(), answers=answers))
    assert module.penalty(rows_of(module), torch.zeros(3, 5)) is None  # no task has started
    module.begin_task([])
    value, slopes = penalty(module)
    assert abs(value) < 1e-6 and max(g.abs().max() for g in slopes) < 1e-6
    value, slopes = penalty(moved(module, 0.2))
    assert value > 1e-3 and max(g.abs().max() for g in slopes) > 1e-4


def test_distillation_is_kl_at_a_temperature(lm):
    module = moved(LwF(lm, ft(), strength=3.0, temperature=2.0, answers=True))
    module.begin_task([])
    old = module.own_delta()
    old = Delta({name: u.clone() for name, u in old.updates.items()})
    moved(module, 0.2)
    rows = lm.tokens.rows(PROMPTS, TARGETS)
    logits = []
    for delta in (old, module.own_delta()):
        with lm.edits.side_by_side([delta], None):
            logits.append(lm.net(rows.ids_BT, attention_mask=rows.mask_BT).logits)
    p, q = ((x / 2).log_softmax(-1) for x in logits)
    kl_BT = (p.exp() * (p - q)).sum(-1)[:, :-1]
    wanted = (
        3.0 * kl_BT[rows.mask_BT[:, 1:].bool()].mean()
    )  # every token after the first is predicted
    assert penalty(module)[0].item() == pytest.approx(wanted.item(), rel=1e-3)


def test_only_prompts_are_distilled_unless_answers_are_wanted(lm):
    module = LwF(lm, ft())
    rows = rows_of(module)
    row_K, position_K = module.also_read(rows)
    assert len(row_K) == int(rows.prompt_RT.sum()) - len(PROMPTS)
    assert rows.prompt_RT[row_K, position_K + 1].all()


# ---------------------------------------------------------------------------- replay


def test_every_edit_is_kept_with_the_same_probability(lm):
    module, kept = Replay(lm, ft(), size=4), Counter()
    runs, seen = 2000, 10
    for seed in range(runs):
        module.seed, module.num_seen, module.buffer = seed, 0, []
        for number in range(seen):
            module._offer("prompt", str(number))
        assert len(module.buffer) == 4
        kept.update(target for _, target in module.buffer)
    expected, variance = runs * 0.4, runs * 0.4 * 0.6
    square = sum((kept[str(n)] - expected) ** 2 for n in range(seen)) / variance
    # chi-squared with 9 degrees of freedom, after the sum's constraint: 27.9 at p = 0.001
    assert square * (seen - 1) / seen < 27.9


def test_only_earlier_tasks_are_replayed(lm, tmp_path):
    module, data = Replay(lm, ft(), rows=2), stream(number=3)
    calls = []
    loss = module.target_rows

    def spied(prompts, targets):
        calls.append((module.current_epoch, set(prompts)))
        return loss(prompts, targets)

    module.target_rows = spied
    train(module, tmp_path, data, epochs=3)
    texts = [{case.edits[0].text for case in cases} for cases in data.tasks.cases]
    assert len(calls) == 4 + 8 + 8
    for epoch, prompts in calls:
        assert prompts <= texts[epoch] or prompts <= set().union(*texts[:epoch])
    assert [text for text, _ in module.buffer] == [
        e.text for c in data.tasks.cases for e in c[0].edits + c[1].edits
    ]


# ---------------------------------------------------------------------------- adapters per task


def test_adapters_add_up_to_the_delta_that_is_written(lm, tmp_path):
    module, ends = TaskLoRA(lm, LoRA([1], lr=5e-2)), []
    end = module.end_task

    def noted(cases):
        before = copy.deepcopy(module.own_delta())
        ends.append(copy.deepcopy(FineTune.update(module).detach()))
        end(cases)
        for name in before.updates:
            torch.testing.assert_close(module.own_delta().dense(name), before.dense(name))

    module.end_task = noted
    train(module, tmp_path, stream(number=3), epochs=3)
    total, written = add_deltas(ends), module.own_delta()
    for name in written.updates:
        torch.testing.assert_close(written.dense(name), total.dense(name))
        assert all(d.dense(name).any() for d in ends)
    beside = lm.score(PROMPTS, TARGETS, [written]).logprob_BM
    WeightPatch(lm, module.delta(EDITS))
    torch.testing.assert_close(lm.score(PROMPTS, TARGETS).logprob_BM, beside, atol=1e-4, rtol=0)


def test_each_task_draws_its_own_directions(lm):
    lora = LoRA([1])
    first, again, other = lora.start(lm, 1), lora.start(lm, 1, 0), lora.start(lm, 1, 1)
    for name in first:
        assert torch.equal(first[name], again[name])
        assert name.endswith(".B") or not torch.equal(first[name], other[name])


def test_overlap_is_penalised_and_orthogonal_directions_are_not(lm):
    module = OLoRA(lm, LoRA([1], rank=2), strength=0.5)
    assert module.penalty(rows_of(module), torch.empty(0)) is None
    names = list(FineTune.update(module).updates)
    inputs = module.leaves[names[0].removesuffix("weight") + "A"].shape[-1]
    past = {
        name: LowRank(torch.ones(u.left_Or.shape), torch.eye(inputs)[:2])
        for name, u in FineTune.update(module).updates.items()
    }
    module.past.put(Delta(past).tensors())

    def directions(rows_rI):
        with torch.no_grad():
            for name, leaf in module.leaves.items():
                if name.endswith(".A"):
                    leaf.copy_(rows_rI)
        return penalty(module)

    assert directions(torch.eye(inputs)[2:4])[0] == 0
    value, slopes = directions(torch.tensor([2.0, -3.0])[:, None] * torch.eye(inputs)[:2])
    assert value == 0.5 * 5 * len(names)  # |diag(2, -3)|
    assert all(
        g.any() == name.endswith("A") for name, g in zip(module.learned, slopes, strict=True)
    )


def test_the_penalty_keeps_tasks_apart(lm, tmp_path):
    def overlap(strength):
        module = OLoRA(lm, LoRA([1], lr=2e-3), strength=strength)
        train(module, tmp_path, stream(passes=10))
        (old,) = module.earlier.updates.values()
        a_rI, b_rI = old.right_rI[:8], old.right_rI[8:]
        return (a_rI @ b_rI.T).abs().mean().item()

    assert overlap(0.5) < 0.5 * overlap(0.0)


# ---------------------------------------------------------------------------- LocFT


def test_the_last_token_of_a_target_ends_the_text(lm):
    plain, module = FineTune(lm, ft()), LocFT(lm, ft())
    short, long = rows_of(plain), rows_of(module)
    last = [int((long.row_N == row).nonzero().max()) for row in range(len(EDITS))]
    assert (long.target_N[last] == lm.tokenizer.eos_token_id).all()
    keep = torch.ones(len(long.target_N), dtype=torch.bool)
    keep[last] = False
    assert torch.equal(long.target_N[keep], short.target_N)
    assert torch.equal(long.position_N[keep], short.position_N)


def test_a_tokenizer_without_an_end_is_refused(lm):
    lm.tokens.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokens.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no token that ends a text"):
        rows_of(LocFT(lm, ft()))


@pytest.mark.parametrize("tasks", [True, False])
def test_it_ends_with_the_first_pass_whose_mean_loss_is_low(lm, tmp_path, tasks, monkeypatch):
    losses = iter(
        [5.0, 0.001, 0.015, 0.001, *[9.0] * 2, 5.0, 0.001] if tasks else [5.0, 0.001, 0.015, 0.001]
    )
    module, taken = LocFT(lm, ft()), []
    monkeypatch.setattr(FineTune, "loss", lambda self, *_: next(losses) * self._one())
    module._one = lambda: sum(leaf.sum() for leaf in module.learned.values()) * 0 + 1
    step = module.training_step

    def spied(batch, batch_idx):
        loss = step(batch, batch_idx)
        taken.append(
            (module.current_epoch, len(batch), None if loss is None else round(loss.item(), 3))
        )
        return loss

    module.training_step = spied
    data = stream(passes=4) if tasks else Stream(batch_size=3)
    trainer = train(module, tmp_path, data, epochs=2 if tasks else 9)
    if not tasks:  # the mean of the second pass is below 0.01
        assert taken == [(0, 3, 5.0), (0, 3, None), (1, 3, 0.015), (1, 3, None)]
        assert trainer.current_epoch == 2
        return
    first, second = taken[:8], taken[8:]
    assert first == [(0, 1, 5.0), (0, 1, None), (0, 1, 0.015), (0, 1, None), *[(0, 0, None)] * 4]
    assert second[:4] == [(1, 1, 9.0), (1, 1, 9.0), (1, 1, 5.0), (1, 1, None)]


def test_a_task_ends_early_once_a_pass_has_a_low_loss_also_when_resumed_within(lm, monkeypatch):
    """Two batches per pass, each in a process of its own; a pass is judged by its mean loss."""
    monkeypatch.setattr(FineTune, "batches_per_pass", 2)
    monkeypatch.setattr(FineTune, "tasks", [CASES[:2]])
    module, judged = FineTune(lm, ft(stop_loss=0.01)), []
    for losses in ([5.0, 0.001], [0.017, 0.001]):
        for idx, value in enumerate(losses):
            monkeypatch.setattr(module, "loss", lambda *_, value=value: torch.tensor(value))
            monkeypatch.setattr(module, "is_learned", lambda *given: judged.append(given))
            module.training_step(CASES[idx : idx + 1], idx)
            checkpoint = {"state_dict": module.state_dict()}
            module.on_save_checkpoint(checkpoint)
            module = FineTune(lm, ft(stop_loss=0.01))
            module.on_load_checkpoint(checkpoint)
    assert [passes for passes, _ in judged] == [1, 1]
    assert [loss for _, loss in judged] == pytest.approx([2.5005, 0.009])
    assert module.is_learned(2, 0.009) and not module.is_learned(1, 2.5)


def test_it_makes_at_most_so_many_passes(lm, tmp_path):
    module = LocFT(lm, ft(steps=3, stop_loss=1e-9))
    sizes, step = [], module.training_step

    def spied(batch, batch_idx):
        sizes.append(len(batch))
        return step(batch, batch_idx)

    module.training_step = spied
    train(module, tmp_path, stream(passes=5), epochs=2)
    assert sizes == 2 * ([1] * 6 + [0] * 4)


def test_a_skipped_batch_changes_nothing(lm, tmp_path):
    module = LocFT(lm, ft(stop_loss=1e3))
    before = learned(module)
    train(module, tmp_path)
    assert same(learned(module), before)


# ---------------------------------------------------------------------------- full fine-tuning


def test_an_update_of_everything_runs_as_if_it_were_written(tiny_lm, family):
    lm = tiny_lm(family)
    module = moved(FineTune(lm, FullFT()), 0.01)
    delta = module.own_delta()
    assert set(delta.updates) == {name for name, _ in lm.net.named_parameters()}
    before = lm.score(PROMPTS, TARGETS).logprob_BM
    beside, text = lm.score(PROMPTS, TARGETS, [delta]), lm.generate(PROMPTS, 4, [delta])
    assert not torch.allclose(beside.logprob_BM, before, atol=1e-2)
    assert torch.equal(lm.score(PROMPTS, TARGETS).logprob_BM, before)
    patch: EditHandle = WeightPatch(lm, module.delta())
    written = lm.score(PROMPTS, TARGETS)
    torch.testing.assert_close(beside.logprob_BM, written.logprob_BM, atol=1e-4, rtol=1e-4)
    assert text == lm.generate(PROMPTS, 4)
    patch.remove()
    assert torch.equal(lm.score(PROMPTS, TARGETS).logprob_BM, before)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gradients_are_those_of_the_network_itself(tiny_lm, kind):
    lm = tiny_lm(kind)
    module = FineTune(lm, FullFT())
    rows_of(module).losses(lm, [module.update()]).mean().backward()
    rows = rows_of(module)
    lm.net.requires_grad_(True)
    wanted = torch.autograd.grad(rows.losses(lm).mean(), list(lm.net.parameters()))
    lm.net.requires_grad_(False)
    for (name, _), other in zip(lm.net.named_parameters(), wanted, strict=True):
        (mine,) = module.leaves[name].grad
        conv = isinstance(lm.net.get_submodule(name.rpartition(".")[0]), Conv1D)
        other = other.T if conv and other.dim() == 2 else other
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-3)


def test_several_updates_of_everything_are_refused_in_one_line(lm):
    deltas = [moved(FineTune(lm, FullFT())).own_delta()] * 2
    with pytest.raises(ValueError, match="cannot run side by side: evaluate them one by one"):
        lm.score(PROMPTS[:2], TARGETS[:2], deltas, [0, 1])


def test_a_sharded_base_has_no_full_update(lm, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "require_unsharded", lambda trainer, name: asked.append(name))
    train(FineTune(lm, ft()), tmp_path)
    assert asked == []
    train(FineTune(lm, FullFT()), tmp_path)
    assert asked == ["FullFT"]


def test_a_quantised_base_has_no_full_update(tiny_folder):
    pytest.importorskip("bitsandbytes")
    folder = str(tiny_folder("llama", hidden_size=64, intermediate_size=128))
    with pytest.raises(ValueError, match="is quantised: load the model without"):
        FullFT().start(LanguageModel(folder, quantization="int8"), 1)


# ---------------------------------------------------------------------------- QLoRA


def test_gradients_of_a_4_bit_base_reach_the_adapter_only(tiny_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    lm = LanguageModel(
        str(tiny_folder("llama", hidden_size=64, intermediate_size=128)), quantization="nf4"
    )
    weights = hash_weights(lm.net)
    before = lm.score(PROMPTS, TARGETS).logprob_BM
    module = FineTune(lm, LoRA(targets="all", lr=1e-2))
    rows_of(module).losses(lm, [module.update()]).mean().backward()
    assert all(parameter.grad is None for parameter in lm.net.parameters())
    assert all(leaf.grad.any() for name, leaf in module.leaves.items() if name.endswith(".B"))
    train(module, tmp_path)
    assert hash_weights(lm.net) == weights and torch.equal(
        lm.score(PROMPTS, TARGETS).logprob_BM, before
    )
    assert lm.score(PROMPTS, TARGETS, [module.own_delta()]).logprob_BM.sum() > before.sum() + 1


# ---------------------------------------------------------------------------- interrupted runs


RUNS = {
    "EWC": ["--model", "EWC", "--model.strength", "1e3", "--model.method", "FT", "--model.method.layers", "[1]"],
    "Replay": ["--model", "Replay", "--model.rows", "1", "--model.method", "FT", "--model.method.layers", "[1]"],
    "OLoRA": ["--model", "OLoRA", "--model.method", "LoRA", "--model.method.layers", "[1]"],
    "DoRA": ["--model", "PeftFineTune", "--model.adapter",
             "{peft_type: LORA, use_dora: true, target_modules: [c_proj]}"],
    "LocFT": ["--model", "LocFT", "--model.method", "FT", "--model.method.layers", "[1]"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "step"), [
    ("EWC", 6), ("OLoRA", 4), ("Replay", 7), ("LocFT", 6), ("DoRA", 6),
])  # fmt: skip
def test_an_interrupted_task_resumes(
    corrigenda, tiny_folder, data_files, tmp_path, monkeypatch, name, step
):
    """Killed in the middle of the second task, or before its first step; no finished step is made again."""
    monkeypatch.setattr(checkpointing, "SAVE_EVERY", 0.0)
    method, *rest = RUNS[name][1:]
    args = [
        "fit", "--model", method, "--model.lm.name", tiny_folder("gpt2"), *rest, "--data", "ZsRE",
        "--data.path", data_files.zsre, "--data.batch_size", "1", "--data.tasks.number", "2",
        "--data.tasks.size", "2", "--data.tasks.passes", "2", "--trainer.max_epochs", "2", *QUIET,
    ]  # fmt: skip
    assert corrigenda(*args, "--run_dir", "whole") == 0
    owner = LocFT if name == "LocFT" else FineTune
    calls, plain = [], owner.training_step

    def counted(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(owner, "training_step", counted)
    assert corrigenda(*args, "--run_dir", "cut") == 130
    assert corrigenda(*args, "--run_dir", "cut", "--ckpt_path", "last") == 0
    assert len(calls) == 8 + 1
    whole, cut = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True)
        for run in ("whole", "cut")
    )
    assert same(whole["state_dict"], cut["state_dict"])
    assert whole["tasks"] == cut["tasks"] and whole.get("replay") == cut.get("replay")
    assert whole["global_step"] == cut["global_step"] == 8
    assert whole["means"] == cut["means"]


# ---------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", ["Adam8bit", "PagedAdamW8bit"])
def test_optimizers_of_bitsandbytes_are_named_like_others(
    corrigenda, tiny_folder, data_files, tmp_path, name
):
    pytest.importorskip("bitsandbytes")
    folder = tiny_folder("gpt2", hidden_size=64)
    args = [
        "fit", "--model", "FineTune", "--model.lm.name", folder, "--model.method", "FT",
        "--model.method.layers", "[1]", "--model.optimizer", f"bitsandbytes.optim.{name}",
        "--model.optimizer.lr", "1e-3", "--data", "ZsRE", "--data.path", data_files.zsre,
        "--trainer.max_epochs", "2", "--run_dir", "run", *QUIET,
    ]  # fmt: skip
    assert corrigenda(*args) == 0
    assert corrigenda(*args, "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert "torch.uint8" in str(_dtypes(saved["optimizer_states"]))
    assert all(tensor.any() for tensor in saved["state_dict"].values())


def _dtypes(state):
    """The types of all tensors in a state."""
    if isinstance(state, torch.Tensor):
        return {state.dtype}
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return set().union(*map(_dtypes, parts))


def test_of_bitsandbytes_only_optimizers_are_named(corrigenda, capsys, tiny_folder):
    for name in ("bitsandbytes.nn.Linear4bit", "bitsandbytes.optim.Adam8bit.step"):
        args = ["--model", "FineTune", "--model.lm.name", tiny_folder(), "--model.method", "FT",
                "--model.method.layers", "[1]", "--model.optimizer", name, "--data", "Facts"]  # fmt: skip
        assert corrigenda("fit", *args) == 2
        assert "is not accepted here: only classes of" in capsys.readouterr().err.splitlines()[-1]
