"""What a validation says of itself: untrained editors, models without edits, precisions."""

import json
import logging

import pytest
from lightning.pytorch import Trainer

from corrigenda.datamodules.counterfact import CounterFact
from corrigenda.modules.editing.weight_patch import WeightPatch
from corrigenda.modules.editors.finetune import FT
from corrigenda.modules.evaluation.module import EditingModule
from corrigenda.modules.model.delta import Delta
from corrigenda.modules.training.scope import ScopeClassifier
from corrigenda.modules.training.tuning import FineTune

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


@pytest.fixture
def tiny(tiny_folder, data_files):
    return [
        "--model.lm.name", tiny_folder("gpt2"), "--data", "CounterFact", "--data.path", data_files.counterfact,
        "--data.limit", "2", "--wandb", "off", "--trainer.accelerator", "cpu", "--run_dir", "run",
        "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["MEND", "KE", "MALMEN"])
def test_an_untrained_editor_is_evaluated_with_a_warning(
    corrigenda, tiny, caplog, tmp_path, method
):
    assert corrigenda("validate", "--model", method, *tiny) == 0
    said = [message for message in caplog.messages if "has not been trained" in message]
    assert len(said) == 1 and said[0].startswith(method) and "--ckpt_path" in said[0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["trained"] is False


def test_a_trained_one_has_none(corrigenda, tiny, data_files, caplog, tmp_path):
    fit = [
        "--data.train_path",
        data_files.zsre_train,
        "--trainer.max_steps",
        "1",
    ]
    data = ["--data", "ZsRE", "--data.path", data_files.zsre, "--edit.save_edits", "false"]
    assert corrigenda("fit", "--model", "MEND", *tiny, *data, *fit) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["trained"] is True
    kept = ["--ckpt_path", "run/checkpoints/last.ckpt", "--run_dir", "after"]
    assert corrigenda("validate", "--model", "MEND", *tiny, *kept) == 0
    assert json.loads((tmp_path / "after" / "summary.json").read_text())["trained"] is True
    assert not any("has not been trained" in message for message in caplog.messages)


def test_parts_of_serac_and_fine_tuning_say_so_too(tiny_lm, data_files, caplog):
    data = CounterFact(data_files.counterfact, limit=2)
    tuned, scope = FineTune(tiny_lm("gpt2"), FT([1], 2)), ScopeClassifier()
    for module in (tuned, scope):
        Trainer(**QUIET).validate(module, data, verbose=False)
    said = [message for message in caplog.messages if "has not been trained" in message]
    assert [message.split()[0] for message in said] == ["FineTune", "ScopeClassifier"]
    Trainer(**QUIET, max_steps=1, limit_val_batches=0).fit(tuned, data)
    assert tuned.trained


def test_validating_the_unedited_model_warns_once(tiny_lm, data_files, caplog):
    caplog.set_level(logging.WARNING)
    data = CounterFact(data_files.counterfact, limit=2)
    lm = tiny_lm("gpt2")
    module, warning = EditingModule(lm), "evaluating the unedited model"
    for _ in range(2):
        Trainer(**QUIET).validate(module, data, verbose=False)
    assert sum(warning in message for message in caplog.messages) == 1
    caplog.clear()
    name = lm.structure.out_name(1) + ".weight"
    WeightPatch(lm, Delta({name: 0 * lm.net.get_parameter(name).data.T}))
    Trainer(**QUIET).validate(EditingModule(lm), data, verbose=False)
    assert not any(warning in message for message in caplog.messages)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_precision_that_converts_weights_is_refused(corrigenda, tiny, capsys, precision, verb):
    given = ["--model", "EditingModule", "--trainer.precision", precision]
    if verb == "fit":  # a stream, as nothing is trained
        given += ["--edit.schedule", "stream", "--edit.editor", "FT", "--edit.editor.layers", "[0]"]
    assert corrigenda(verb, *given, *tiny) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"trainer.precision {precision} would" in error
    assert "--model.lm.dtype" in error


def test_mixed_precision_edits_and_leaves_the_weights(corrigenda, tiny, tmp_path):
    editor = ["--edit.editor", "FT", "--edit.editor.layers", "[1]", "--edit.editor.steps", "2"]
    hashes = []
    for precision in ("32-true", "bf16-mixed"):
        more = ["--trainer.precision", precision, "--run_dir", precision]
        assert corrigenda("validate", "--model", "EditingModule", *tiny, *editor, *more) == 0
        hashes.append(json.loads((tmp_path / precision / "summary.json").read_text())["model_hash"])
    assert hashes[0] == hashes[1]
