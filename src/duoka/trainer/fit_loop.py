"""Training loop of one rank: epochs, evaluations, checkpoints and the end."""

import contextlib
import math
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from duoka import checkpoint
from duoka.data import DataPosition, LocalBatch
from duoka.log import logger
from duoka.trainer.batch_coupling import warn_of_batch_coupling
from duoka.trainer.callback_sync import CallbackSync
from duoka.trainer.callbacks import TIME_IS_OVER, Best, State
from duoka.trainer.checked_loader import build_loader, part_size
from duoka.trainer.checkpoint_files import check_space, checkpoint_path, find_checkpoints
from duoka.trainer.checkpointing import TrainCheckpoint, run_on_rank_zero
from duoka.trainer.evaluation import evaluate
from duoka.trainer.finite_loss import LayerWatch, LossWatch
from duoka.trainer.fit_spec import FitSpec, build_model_with_loss
from duoka.trainer.metrics import Metrics, Results
from duoka.trainer.model_selection import PREFIX, BestTracker
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.trainer.out_of_memory import MicroBatches, explain, is_out_of_memory
from duoka.trainer.progress import Reporter, format_number, reporter_for
from duoka.trainer.run_dir import RunDir
from duoka.trainer.step_agreement import StepAgreement, StepEvents
from duoka.trainer.step_setup import build_train_step
from duoka.trainer.train_logger import TrainLogger, startup_summary
from duoka.trainer.train_step import accumulation_windows
from duoka.utils.rng_state import preserve_rng_state, seed_all, set_rng_state
from duoka.utils.run_lock import run_lock
from duoka.utils.signals import SignalWatch, interruption
from duoka.utils.torch_settings import preserve_train_modes, train_except_frozen
from duoka.world import World, current_world


class FitOutcome(NamedTuple):
    """Result of a fit, which rank 0 returns to the user's ``Trainer``."""

    validation: Results
    test: Results
    history: list[dict[str, Any]]
    best: Best | None
    stop_reason: str
    signal: int = 0
    """Number of the signal that has interrupted training; 0 for none."""


def fit_on_rank(spec: FitSpec) -> FitOutcome:
    """Train ``spec.model`` on this rank; every rank of the world must call this."""
    world = current_world()
    torch.empty(0, device=world.device)  # initializes the accelerator, so that its generator has a state to preserve
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserve_rng_state())
        stack.enter_context(preserve_train_modes(spec.model))
        module = stack.enter_context(build_model_with_loss(spec, world))
        signals = stack.enter_context(SignalWatch())
        outcome = FitLoop(spec, world, module, signals, stack).run()
    if signals.received and not outcome.signal and world.is_main:  # it came too late to interrupt training
        signal.raise_signal(signals.received)
    return outcome


class FitLoop:
    """The parts of a fit, and the order in which they run."""

    def __init__(
        self, spec: FitSpec, world: World, module: ModelWithLoss, signals: SignalWatch, stack: contextlib.ExitStack
    ) -> None:
        config = spec.config
        self.spec, self.config, self.world, self.module, self.stack = spec, config, world, module, stack
        self.strategy, self.strategy_reason = spec.strategy(world)
        self.metrics = Metrics(spec.metrics, world.device)
        self.train_metrics = Metrics(spec.train_metrics, world.device)
        self.best_tracker = BestTracker(config, self.metrics, spec.eval_data is not None)
        self.train_loader = build_loader(spec, "train_data", self.strategy)
        self.eval_loader = None if spec.eval_data is None else build_loader(spec, "eval_data", self.strategy)
        self.test_loader = None if spec.test_data is None else build_loader(spec, "test_data", self.strategy)
        for loader in (self.train_loader, self.eval_loader, self.test_loader):
            if loader is not None:
                stack.callback(loader.close)
        self.steps_per_epoch: int | None = None
        with contextlib.suppress(TypeError):  # data without length
            self.steps_per_epoch = -(-len(self.train_loader) // config.gradient_accumulation_steps)
        seed_all((config.seed + 1_000_003 * world.rank) % 2**63)  # ranks differ, so that their dropout masks do
        self.train_step = build_train_step(config, module, self.strategy, self.train_metrics, self.steps_per_epoch)
        module.capture_outputs = not self.train_metrics.empty
        self.state = State(spec.model, self.train_step.optimizer, config.epochs, self.train_step.loss_meter)
        reporter: Reporter = reporter_for(config.verbose) if world.is_main else Reporter()
        stack.callback(reporter.close)
        self.run_dir = None
        if world.is_main and config.out_dir is not None:
            self.run_dir = RunDir(config.out_dir, config.tensorboard)
            stack.callback(self.run_dir.close)
        self.log = TrainLogger(config, self.state, reporter, self.run_dir, is_main=world.is_main)
        self.train_step.zero_grad()  # gradients from before the fit do not enter the first step
        stack.callback(self.train_step.zero_grad)
        self.checkpoint = TrainCheckpoint(module, self.train_step, self.state, self.best_tracker.name, world)
        self.checkpoint.keep = config.keep_checkpoints
        callbacks = spec.rank_zero.callbacks if world.is_main else ()
        self.callbacks = CallbackSync(callbacks, self.state, module, self.strategy, world)
        self.agreement = StepAgreement(config, world, signals)
        self.loss_watch = self._build_loss_watch()
        self.signal = 0
        self.order_seed = config.seed
        self.resumed_rng: Any = None
        self.is_wrapped = False
        self.is_loss_checked = self.strategy.replicas == 1 or not world.is_main

    def _notify(self, event: str) -> None:
        """Call the method ``event`` of each callback, in order; a callback may change which parameters are trained."""
        if self.callbacks.notify(event):
            self.train_step.note_parameters()
            self.train_step.call = self.module.forward
            self.is_wrapped = False

    def _build_loss_watch(self) -> LossWatch | None:
        if self.config.on_nonfinite_loss == "warn" or self.train_step.scaler is not None:
            return None
        layers = LayerWatch(self.spec.model, self.stack) if self.config.find_nonfinite_layer else None
        return LossWatch(self.module, self.train_step.loss_meter, self.world, layers)

    def _check_finite(self, *, with_parameters: bool = False) -> None:
        if self.loss_watch is not None:
            self.loss_watch.check(with_parameters=with_parameters)

    def run(self) -> FitOutcome:
        """Train to the end, or until stopped, and return the results."""
        try:
            return self._run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            batch = self.train_step.micro_batch or part_size(self.spec, self.strategy.replicas)
            raise explain(error, self.module, self.train_step.optimizer, self.world.device, batch) from error

    def _run(self) -> FitOutcome:
        first_epoch = self._begin()
        if names := train_except_frozen(self.module):
            self.log.say(f"stays in evaluation mode, as before fit: {names}")
        self._notify("on_fit_start")
        for epoch in range(first_epoch, self.config.epochs):
            if self._should_stop():
                break
            is_complete = self._train_epoch(epoch)
            if not self.signal:
                self._end_epoch(epoch, is_complete=is_complete)
            if self.signal:
                return self._interrupt()
        return self._finish()

    def _should_stop(self) -> bool:
        """Return on every rank whether training stops here; rank 0's callbacks may have requested it."""
        self.state.stop_reason = self.world.broadcast_object(self.state.stop_reason)
        return bool(self.state.stop_reason) or self._is_last_step()

    def _is_last_step(self) -> bool:
        return self.config.max_steps is not None and self.state.step >= self.config.max_steps

    def _begin(self) -> int:
        """Restore the checkpoint, if any, and return the first epoch, from 0.

        Nothing is written before the checkpoint has been accepted, so an error leaves the folder unchanged.
        """
        run_on_rank_zero(self.world, self._lock_run_dir)
        paths = run_on_rank_zero(self.world, lambda: find_checkpoints(self.config))
        epoch, path = 0, None
        if paths:
            path, position, self.resumed_rng = self.checkpoint.restore(paths)
            epoch, self.order_seed = int(position["epoch"]), int(position["seed"])
            if self.order_seed != self.config.seed and self.world.is_main:
                differs = f"seed={self.config.seed} differs from seed={self.order_seed} of {path}"
                logger.warning("%s; the sample order continues with the checkpoint's seed", differs)
        self.best_tracker.check_patience(self.state)
        run_on_rank_zero(self.world, lambda: self._open_run_dir(resumed=path))
        if path is not None:
            self.log.resumed(path, epoch)
        if self.world.is_main:
            optimizer, tracker = self.train_step.optimizer, self.best_tracker
            self.log.say(*startup_summary(self.spec, self.strategy, self.strategy_reason, optimizer, tracker.summary))
        return epoch

    def _lock_run_dir(self) -> None:
        """Keep other programs from the folder until the fit ends."""
        if self.run_dir is not None:
            self.stack.enter_context(run_lock(self.run_dir.path))

    def _open_run_dir(self, *, resumed: Path | None) -> None:
        """Prepare the folder; its run continues if ``resumed`` is its own checkpoint."""
        if self.run_dir is not None:
            own = checkpoint_path(self.run_dir.path).resolve().parent
            is_new = resumed is None or resumed.resolve().parent != own
            check_space(self.config, *self.checkpoint.size_bytes(), is_new=is_new)
            options, weights = self.config.to_plain(), self.spec.weights_path
            self.run_dir.start(options, self.state.history, is_new=is_new, weights=weights)
        if self.spec.weights_path is not None:
            checkpoint.check_writable(self.spec.weights_path)

    def _train_epoch(self, epoch: int) -> bool:
        """Take the steps of an epoch; return whether it is complete."""
        state, train_step, reporter = self.state, self.train_step, self.log.reporter
        state.epoch = epoch + 1
        self.train_loader.set_position(DataPosition(self.order_seed, epoch, state.samples_in_epoch))
        self.log.begin_epoch(self.steps_per_epoch)
        config, clock, agreement = self.config, time.perf_counter, self.agreement
        has_step_work = "on_step_end" in self.callbacks.overridden or config.checkpoint_every_steps or config.max_steps
        has_step_work = has_step_work or config.find_nonfinite_layer
        for window in accumulation_windows(self.train_loader, config.gradient_accumulation_steps):
            train_step.loss_meter.step = state.step + 1
            samples = train_step.step(window) if self.is_wrapped else self._first_step(window)
            state.step += 1
            state.samples += samples
            state.samples_in_epoch += samples
            if clock() >= reporter.due:
                self.log.show_progress(self.world.device)
            if (has_step_work or state.step >= agreement.next_step) and self._after_step(epoch):
                return False
        return True

    def _first_step(self, window: list[LocalBatch]) -> int:
        """Wrap the module and take a step; to find unused parameters, take the step first, without the wrapper."""
        if self.resumed_rng is not None:
            set_rng_state(self.resumed_rng)
            self.resumed_rng = None
        if not self.is_loss_checked:
            self.is_loss_checked = True
            warn_of_batch_coupling(self.module, window[0], self.world.device, self.strategy.replicas)
        self._prepare_micro_batches(window)
        unused, options = self.config.find_unused_parameters, self.config.ddp_options
        is_decided = self.world.size == 1 or options.keys() & {"find_unused_parameters", "static_graph"}
        if self.train_step.recovery is not None:
            unused = False
        elif unused is None:
            unused = False if is_decided else self.checkpoint.has_unused_parameters
        if unused is not None:
            self._wrap(unused)
            return self.train_step.step(window)
        self.strategy.broadcast([*self.module.parameters(), *self.module.buffers()])
        samples, names = self.train_step.step_before_wrapping(window)
        if names:
            self.log.say(f"unused in the first step: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
        self.checkpoint.has_unused_parameters = bool(names)  # a resumed run then takes all its steps wrapped
        self._wrap(bool(names))
        return samples

    def _prepare_micro_batches(self, window: list[LocalBatch]) -> None:
        """Find the size of the parts, and take steps that may be repeated, as the options say."""
        micro_batches = MicroBatches(self.train_step, self.log.say)
        if self.config.micro_batch_size == "fit" and self.train_step.micro_batch is None:
            micro_batches.fit(window)
        if self.config.on_out_of_memory == "halve":
            self.train_step.recovery = micro_batches.step

    def _wrap(self, find_unused_parameters: bool) -> None:
        if self.config.compile:
            self.module.compile()
        if self.train_step.recovery is not None:
            self.strategy.broadcast([*self.module.parameters(), *self.module.buffers()])
            wrapped: torch.nn.Module = self.module
        else:
            wrapped = self.strategy.wrap(self.module, find_unused_parameters=find_unused_parameters)
        if self.config.compile or wrapped is not self.module:
            self.train_step.call = wrapped
        self.is_wrapped = True

    def _after_step(self, epoch: int) -> bool:
        """Run step callbacks and write a checkpoint if it is due; return whether training stops here."""
        state, every = self.state, self.config.checkpoint_every_steps
        if "on_step_end" in self.callbacks.overridden:
            self._notify("on_step_end")
            if self._should_stop():
                return True
        is_meeting = state.step >= self.agreement.next_step
        if is_meeting or self.config.find_nonfinite_layer:
            self._check_finite()
        events = self.agreement.meet(state.step) if is_meeting else StepEvents()
        is_due = events.is_checkpoint_due or events.signal
        if is_due or (every is not None and state.step % every == 0):
            self._write_checkpoint(epoch, state.samples_in_epoch)
        self._note_events(events)
        return bool(self.signal) or events.is_time_over or self._is_last_step()

    def _note_events(self, events: StepEvents) -> None:
        """End training as the ranks have agreed."""
        self.signal = events.signal
        if events.is_time_over:
            self.state.stop(TIME_IS_OVER)

    def _interrupt(self) -> FitOutcome:
        """End at a signal, after the checkpoint has been written; no rank ends before that."""
        self.world.barrier()
        state = self.state
        where = "" if self.config.out_dir is None else f"; saved in {checkpoint_path(self.config.out_dir)}"
        self.log.say(f"stopped by {signal.Signals(self.signal).name} after {state.step:,} steps{where}")
        return FitOutcome({}, {}, state.history, state.best, interruption(self.signal).message, self.signal)

    def _end_epoch(self, epoch: int, *, is_complete: bool) -> None:
        """Evaluate and record. The checkpoint of an incomplete epoch has the position within it."""
        state, meter, schedule = self.state, self.train_step.loss_meter, self.train_step.schedule
        self._check_finite()
        loss = meter.global_mean(self.world)
        record = self.log.record(math.nan if loss is None else self.log.checked_loss(loss))
        record.update({f"train_{name}": value for name, value in self.train_metrics.compute(self.world).items()})
        self.train_metrics.reset()
        if is_complete:
            schedule.after_epoch()
            if self.eval_loader is None:
                schedule.after_evaluation(record["train_loss"])
        is_last = epoch + 1 == self.config.epochs or self._is_last_step()
        is_due = is_last or (epoch + 1) % self.config.eval_every_epochs == 0
        is_due = self.eval_loader is not None and (is_due or self._should_stop())
        is_early = state.stop_reason == TIME_IS_OVER and not is_complete
        if is_early:  # a resumed run goes on with this epoch, so its checkpoint knows nothing of the evaluation below
            self._write_checkpoint(epoch, state.samples_in_epoch)
        is_best = is_due and self._evaluate(record, end_of_epoch=is_complete)
        if not is_complete and not is_early:
            self._write_checkpoint(epoch, state.samples_in_epoch)
        meter.reset()
        state.history.append(record)
        self._notify("on_epoch_end")
        if is_complete:
            state.samples_in_epoch = 0
            self._write_checkpoint(epoch + 1, 0)
            if not is_last:
                self._note_events(self.agreement.meet(state.step))
        self.log.end_epoch(record, is_best=is_best)  # after the checkpoint: a user who reads this line may interrupt

    def _evaluate(self, record: dict[str, Any], *, end_of_epoch: bool) -> bool:
        """Evaluate, add the results to ``record`` and return whether they are the best so far."""
        state, began = self.state, time.monotonic()
        self.strategy.broadcast(self.module.buffers())
        assert self.eval_loader is not None  # the callers have checked it
        state.validation = evaluate(self.module, self.eval_loader, self.metrics, self.world)
        self.log.checked_loss(state.validation.get("loss", 0.0), "evaluation's loss")
        record.update({f"{PREFIX}{name}": value for name, value in state.validation.items()})
        is_best = self.best_tracker.update(state, end_of_epoch=end_of_epoch)
        if is_best and self.world.is_main:
            self.checkpoint.keep_best_weights()
        if end_of_epoch:
            monitored = self.best_tracker.value(state.validation)
            self.train_step.schedule.after_evaluation(state.validation.get("loss") if monitored is None else monitored)
        self._notify("on_evaluate")
        self.agreement.durations_s["evaluation"] = time.monotonic() - began
        return is_best

    def _write_checkpoint(self, epoch: int, samples: int) -> None:
        if self.config.out_dir is not None:
            self._check_finite(with_parameters=True)
            began = time.monotonic()
            position = DataPosition(self.order_seed, epoch, samples).to_dict()
            self.checkpoint.write(checkpoint_path(self.config.out_dir), position)
            self.agreement.durations_s["checkpoint"] = time.monotonic() - began
            self.agreement.note_checkpoint()

    def _finish(self) -> FitOutcome:
        state = self.state
        if state.stop_reason:
            self.log.say(f"stopped early: {state.stop_reason}")
        self._evaluate_last_weights()
        self._restore_best_weights()
        test: Results = {}
        if self.test_loader is not None:
            test = evaluate(self.module, self.test_loader, self.metrics, self.world)
            self.log.results("test", test)
        if self.run_dir is not None:
            self.run_dir.draw(state.history)
        self._notify("on_fit_end")
        validation = state.validation if state.best is None else state.best.results
        return FitOutcome(validation, test, state.history, state.best, state.stop_reason)

    def _evaluate_last_weights(self) -> None:
        """Evaluate the final weights, if training stopped between two evaluations."""
        state = self.state
        record = state.history[-1] if state.history and state.history[-1]["step"] == state.step else {}
        if self.eval_loader is None or state.best is not None or any(name.startswith(PREFIX) for name in record):
            return
        self._evaluate(record, end_of_epoch=False)
        if record:
            self.log.write_records()
        self.log.results("validation", state.validation)

    def _restore_best_weights(self) -> None:
        """Load the best weights, if there are any, into the user's model, and write the final weights to disk."""
        best, model, path = self.state.best, self.spec.model, self.spec.weights_path
        if path is not None:
            self._check_finite(with_parameters=True)
        if best is not None and self.world.is_main:
            checkpoint.load_state(model, self.checkpoint.best_weights)
        if path is not None and self.world.is_main:
            checkpoint.save(model, path)
        self.strategy.broadcast([*self.module.parameters(), *self.module.buffers()])
        if best is not None:
            name, value = self.best_tracker.name, format_number(best.value)
            self.log.say(f"the model has the weights of epoch {best.epoch}, {name} {value}")
        if path is not None:
            self.log.say(f"weights: {path}")
