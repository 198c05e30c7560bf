"""When a fit saves its last checkpoint, and when signals arrive, with a trainer of plain values."""

import os
import signal
from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn

from corrigenda.pipeline import checkpointing
from corrigenda.pipeline.checkpointing import NEEDED_TO_RESUME, LastCheckpoint


class PlainTrainer(SimpleNamespace):
    """The part of a Trainer that the callback reads; ``saved`` holds (step, values to log) of each checkpoint."""

    def __init__(self, **values):
        super().__init__(
            accumulates=False, validates=False, to_log=(0, {}), fast_dev_run=False, global_step=1,
            max_steps=-1, should_stop=False, is_last_batch=False, current_epoch=0, max_epochs=3,
            sanity_checking=False, world_size=1, ckpt_path=None, loggers=[], saved=[],
            state=SimpleNamespace(fn=TrainerFn.FITTING),
            strategy=SimpleNamespace(broadcast=lambda value: value),
        )  # fmt: skip
        vars(self).update(values)

    def save_checkpoint(self, path, weights_only):
        assert path == self.callback.path and weights_only is False
        self.saved.append((self.global_step, self.callback.state_dict()["values"]))


class Logger:
    def __init__(self):
        self.rows = []

    def log_metrics(self, values, step):
        self.rows.append((step, values))


@pytest.fixture
def clock(monkeypatch):
    """The time, which passes only when a test changes it."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def start(tmp_path, clock, monkeypatch):
    """``start(**values)``: (trainer, callback) of a training that has started."""
    monkeypatch.setattr(checkpointing, "accumulates_gradients", lambda trainer: trainer.accumulates)
    monkeypatch.setattr(checkpointing, "validation_is_due", lambda trainer: trainer.validates)
    monkeypatch.setattr(checkpointing, "values_to_log", lambda trainer: trainer.to_log)
    started = []

    def make(**values):
        trainer, callback = PlainTrainer(**values), LastCheckpoint(tmp_path)
        trainer.callback = callback
        started.append(callback)
        callback.on_train_start(trainer, None)
        return trainer, callback

    yield make
    for callback in started:
        callback._signals.drop()


@pytest.fixture(autouse=True)
def signals_as_before():
    """Set up before all other fixtures, so that it restores the handlers last."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def received(monkeypatch):
    """Numbers of the signals that reach the handlers which were there before."""
    numbers = []
    before = {
        number: signal.signal(number, lambda number, _: numbers.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


# ---------------------------------------------------------------------------- when


def test_a_checkpoint_is_saved_once_a_minute(start, clock):
    trainer, callback = start()
    saved = []
    for seconds in (59.0, 60.0, 119.0, 124.0):
        clock.seconds = 1000.0 + seconds
        trainer.global_step += 1
        callback.on_train_batch_end(trainer)
        saved.append(len(trainer.saved))
    assert saved == [0, 1, 1, 2]
    clock.seconds += 61.0
    callback.on_train_start(trainer, None)  # the time before it does not count
    callback.on_train_batch_end(trainer)
    assert len(trainer.saved) == 2


@pytest.mark.parametrize(
    ("values", "is_saved"),
    [
        ({}, False),
        ({"should_stop": True}, True),
        ({"max_steps": 1}, True),
        ({"max_steps": 2}, False),
        ({"max_steps": 1, "accumulates": True}, False),
        ({"max_steps": 1, "validates": True}, False),
        ({"max_steps": 1, "fast_dev_run": True}, False),
        ({"max_steps": 1, "is_last_batch": True, "max_epochs": 1}, True),
        (
            {"is_last_batch": True, "max_epochs": 1, "should_stop": True},
            False,
        ),  # at the epoch's end
        ({"is_last_batch": True, "max_epochs": 2, "should_stop": True}, True),
        ({"is_last_batch": True, "max_epochs": 0, "should_stop": True}, True),
        ({"max_epochs": 1, "should_stop": True}, True),
    ],
)
def test_the_last_step_is_saved_when_it_ends(start, values, is_saved):
    trainer, callback = start(**values)
    callback.on_train_batch_end(trainer)
    assert trainer.saved == [(1, {})] * is_saved


def test_all_processes_save_together(start):
    trainer, callback = start(max_steps=1)
    trainer.strategy.broadcast = lambda due: not due
    callback.on_train_batch_end(trainer)
    assert not trainer.saved
    trainer.max_steps = -1
    callback.on_train_batch_end(trainer)
    assert len(trainer.saved) == 1


def test_the_last_epochs_last_step_is_saved_after_it(start):
    trainer, callback = start(is_last_batch=True, max_epochs=1, should_stop=True)
    callback.on_train_batch_end(trainer)
    assert not trainer.saved
    for _ in range(2):
        callback.on_train_epoch_end(trainer, None)
        assert len(trainer.saved) == 1
    trainer, callback = start()
    callback.on_train_epoch_end(trainer, None)
    assert not trainer.saved


def test_a_step_before_a_validation_is_saved_after_it(start):
    trainer, callback = start(validates=True)
    callback.on_validation_end(trainer, None)
    assert not trainer.saved  # no step has been made
    callback.on_train_batch_end(trainer)
    trainer.sanity_checking = True
    callback.on_validation_end(trainer, None)
    assert not trainer.saved
    trainer.sanity_checking = False
    callback.on_validation_end(trainer, None)
    assert len(trainer.saved) == 1
    trainer.accumulates = True
    callback.on_train_batch_end(trainer)
    callback.on_validation_end(trainer, None)
    assert len(trainer.saved) == 1


def test_the_end_of_training_is_saved_unless_it_has_been(start, tmp_path):
    trainer, callback = start()
    for _ in range(2):
        callback.on_train_end(trainer, None)
        assert len(trainer.saved) == 1
    trainer.global_step = 0
    callback.on_train_end(trainer, None)
    assert len(trainer.saved) == 2
    last = "checkpoints/../checkpoints/last.ckpt"
    for path, count in (("a.ckpt", 1), ("x.ckpt", 1), (last, 0)):
        trainer, callback = start(ckpt_path=str(tmp_path / path))
        callback.on_train_end(trainer, None)
        assert len(trainer.saved) == count


def test_before_any_step_the_end_of_training_is_saved(start):
    trainer, callback = start(global_step=0)
    callback.on_train_end(trainer, None)
    assert len(trainer.saved) == 1


# ---------------------------------------------------------------------------- what


def test_values_that_are_logged_after_a_save_are_in_it(start):
    trainer, callback = start(max_steps=1, to_log=(1, {"loss": 2.0}))
    callback.on_train_batch_end(trainer)
    assert trainer.saved == [(1, {"loss": 2.0})]
    assert callback.state_dict() == {"step": 0, "values": {}}


@pytest.mark.parametrize("begins", [True, False])
def test_restored_values_are_logged_once(start, begins):
    trainer, callback = start(loggers=[Logger(), Logger()])
    callback.load_state_dict({"step": 4, "values": {"loss": 2.0}})
    assert callback.state_dict() == {"step": 4, "values": {"loss": 2.0}}
    callback.teardown(trainer, None, "validate")
    assert not trainer.loggers[0].rows
    for _ in range(2):
        if begins:
            callback.on_train_start(trainer, None)
        else:
            callback.teardown(trainer, None, "fit")
    assert [logger.rows for logger in trainer.loggers] == [[(4, {"loss": 2.0})]] * 2
    assert callback.state_dict() == {"step": 0, "values": {}}


def test_nothing_is_logged_by_a_new_run(start):
    trainer, callback = start(loggers=[Logger()])
    callback.teardown(trainer, None, "fit")
    assert not trainer.loggers[0].rows and callback.state_dict() == {"step": 0, "values": {}}


@pytest.mark.parametrize("lacking", sorted(NEEDED_TO_RESUME))
def test_training_needs_a_whole_checkpoint(start, lacking):
    trainer, callback = start(ckpt_path="a.ckpt")
    whole = dict.fromkeys([*NEEDED_TO_RESUME, "state_dict"])
    callback.on_load_checkpoint(trainer, None, whole)
    del whole[lacking]
    with pytest.raises(ValueError, match=rf"checkpoint a\.ckpt, which has no {lacking}: give one"):
        callback.on_load_checkpoint(trainer, None, whole)
    for other in (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING):
        trainer.state.fn = other
        callback.on_load_checkpoint(trainer, None, whole)


# ---------------------------------------------------------------------------- signals


def test_a_signal_arrives_when_its_step_is_saved(start, received, capfd):
    trainer, callback = start()
    callback.on_train_batch_end(trainer)
    assert not trainer.saved
    send()
    assert not received and "stopping after this step" in capfd.readouterr().err
    callback.on_train_batch_end(trainer)
    assert len(trainer.saved) == 1 and received == [signal.SIGTERM]


def test_a_signal_in_the_last_step_arrives_when_the_epoch_has_ended(start, received):
    trainer, callback = start(is_last_batch=True, max_epochs=1)
    send(signal.SIGINT)
    callback.on_train_batch_end(trainer)
    assert not received and not trainer.saved
    callback.on_train_epoch_end(trainer, None)
    assert received == [signal.SIGINT] and len(trainer.saved) == 1


def test_in_a_step_that_is_not_saved_a_signal_arrives_too(start, received):
    trainer, callback = start(accumulates=True)
    send()
    callback.on_train_batch_end(trainer)
    assert received == [signal.SIGTERM] and not trainer.saved


@pytest.mark.parametrize("hook", ["on_validation_start", "on_train_end", "on_train_epoch_end"])
def test_a_held_signal_arrives_when_training_pauses(start, received, hook):
    trainer, callback = start()
    send()
    getattr(callback, hook)(trainer, None)
    assert received == [signal.SIGTERM]
    send()
    assert received == [signal.SIGTERM] * 2  # no longer held


@pytest.mark.parametrize(
    ("values", "is_held"),
    [({}, True), ({"sanity_checking": True}, False), ({"world_size": 2}, False)],
)
def test_after_a_validation_signals_are_held_again(start, received, values, is_held):
    trainer, callback = start()
    callback.on_validation_start(trainer, None)
    vars(trainer).update(values)
    callback.on_validation_end(trainer, None)
    send()
    assert received == ([] if is_held else [signal.SIGTERM])


@pytest.mark.parametrize("fn", [TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING])
def test_outside_of_training_signals_are_not_held(start, received, fn):
    trainer, callback = start()
    callback.on_validation_start(trainer, None)
    trainer.state.fn = fn
    callback.on_validation_end(trainer, None)
    send()
    assert received == [signal.SIGTERM]


def test_an_error_drops_what_is_held(start, received):
    trainer, callback = start()
    send()
    callback.on_exception(trainer, None, RuntimeError())
    assert not received and not callback._signals.is_held
    send()
    assert received == [signal.SIGTERM]


def test_a_second_ctrl_c_ends_the_process(start, received, monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(checkpointing, "end_at_once", lambda: ended.append("ended"))
    _, callback = start()
    send(signal.SIGINT)
    send(signal.SIGTERM)
    assert not ended and callback._signals.is_held
    send(signal.SIGINT)
    assert ended == ["ended"] and not received
    assert capfd.readouterr().err.count("stopping after this step") == 1
