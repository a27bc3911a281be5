"""One rank's whole training run: epochs, evaluations, what is kept and when it stops."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from duoka import checkpoint
from duoka.checkpoint import rng_state, set_rng_state
from duoka.data import DataPosition
from duoka.log import logger
from duoka.trainer.callbacks import Best, Callbacks, State
from duoka.trainer.checkpointing import (
    BestWeights,
    TrainCheckpoint,
    checkpoint_path,
    find_checkpoint,
    is_own,
    on_main,
    weights_path,
)
from duoka.trainer.evaluation import evaluate
from duoka.trainer.loss_meter import LossMeter
from duoka.trainer.metrics import Metrics, Results
from duoka.trainer.model_selection import PREFIX, BestTracker
from duoka.trainer.model_with_loss import ModelWithLoss
from duoka.trainer.optimizers import build_optimizer, build_schedule
from duoka.trainer.progress import Reporter, reporter_for
from duoka.trainer.run_dir import NullRunDir, RunDir
from duoka.trainer.setup import FitSpec, modes_kept, prepared_objective, seed_rank, sharded, unused_parameters
from duoka.trainer.train_logger import TrainLogger
from duoka.trainer.train_step import TrainStep, windows
from duoka.trainer.words import introduction, learning_rate
from duoka.world import World, current_world

__all__ = ["FitOutcome", "fit_on_rank"]


@dataclass(frozen=True)
class FitOutcome:
    """What rank 0 hands back to the user's ``Trainer``."""

    validation: Results
    test: Results
    history: list[dict[str, Any]]
    best: Best | None
    stopping: str


def fit_on_rank(job: FitSpec) -> FitOutcome:
    """Train ``job.model`` on this rank; every rank of the world has to call it."""
    world = current_world()
    with contextlib.ExitStack() as stack:
        torch.empty(0, device=world.device)  # from here on an accelerator is used, so its generator has a state to keep
        stack.callback(set_rng_state, rng_state())
        stack.enter_context(modes_kept(job.model))
        objective = stack.enter_context(prepared_objective(job, world))
        return FitLoop(job, world, objective, stack).run()


class FitLoop:
    """The parts of a fit and the order in which they work."""

    def __init__(self, job: FitSpec, world: World, objective: ModelWithLoss, stack: contextlib.ExitStack) -> None:
        config = job.config
        self.job, self.config, self.world, self.objective = job, config, world, objective
        self.strategy, self.strategy_reason = job.strategy(world)
        self.metrics = Metrics(job.metrics, world.device)
        self.train_metrics = Metrics(job.train_metrics, world.device)
        self.judge = BestTracker(config, self.metrics, job.eval_data is not None)
        self.callbacks = Callbacks(job.main.callbacks if world.is_main else ())
        self.train = sharded(job, "train_data", self.strategy)
        self.evaluations = None if job.eval_data is None else sharded(job, "eval_data", self.strategy)
        self.tests = None if job.test_data is None else sharded(job, "test_data", self.strategy)
        for data in (self.train, self.evaluations, self.tests):
            if data is not None:
                stack.callback(data.close)
        self.steps_per_epoch = self._count_steps()
        seed_rank(config.seed, world)
        self.stepper = self._build_stepper()
        if not self.train_metrics.empty:
            objective.keeps, self.stepper.observe = True, self._observe
        self.state = State(job.model, self.stepper.optimizer, config.epochs, self.stepper.tally)
        reporter: Reporter = reporter_for(config.verbose) if world.is_main else Reporter()
        stack.callback(reporter.close)
        writes = world.is_main and config.out_dir is not None
        self.folder = RunDir(str(config.out_dir), config.tensorboard) if writes else NullRunDir()
        stack.callback(self.folder.close)
        self.teller = TrainLogger(config, self.state, reporter, self.folder, is_main=world.is_main)
        self.stepper.zero_grad()  # what the user's own backward has left is no part of the first step
        stack.callback(self.stepper.zero_grad)
        self.weights_path = weights_path(config, job.save_model, job.model_path)
        self.best_weights = BestWeights()
        self.progress = TrainCheckpoint(objective, self.stepper, self.state, self.best_weights, self.judge.name, world)
        self.watch_steps = world.broadcast_object(self.callbacks.watch_steps)
        self.order_seed = config.seed
        self.rank_rng: Any = None
        self.wrapped = False

    def _observe(self) -> None:
        """Take what was just trained on into the metrics of training."""
        assert self.objective.seen is not None  # its forward has set it
        self.train_metrics.update(*self.objective.seen)
        self.objective.seen = None

    def _count_steps(self) -> int | None:
        try:
            return -(-len(self.train) // self.config.gradient_accumulation_steps)
        except TypeError:
            return None

    def _build_stepper(self) -> TrainStep:
        config, factor = self.config, learning_rate(self.config, self.strategy.replicas).factor
        optimizer = build_optimizer(config, self.objective, factor)
        schedule = build_schedule(config, optimizer, self.steps_per_epoch, factor)
        self.objective.alone = (
            self.strategy.name == "single" and config.gradient_accumulation_steps == 1 and not config.compile
        )
        scaler = torch.amp.GradScaler(self.world.device.type) if config.precision == "fp16" else None
        return TrainStep(
            self.objective,
            self.strategy,
            optimizer,
            schedule,
            LossMeter(self.world.device),
            max_grad_norm=config.max_grad_norm,
            scaler=scaler,
        )

    def run(self) -> FitOutcome:
        """Train until the end, early or not, and return the results."""
        first_epoch = self._begin()
        self.objective.train()
        self.callbacks.call("on_fit_start", self.state)
        for epoch in range(first_epoch, self.config.epochs):
            if self._is_over():
                break
            whole = self._train_epoch(epoch)
            self._end_epoch(epoch, whole=whole)
        return self._finish()

    def _is_over(self) -> bool:
        """Whether training stops here, agreed over the ranks: rank 0's callbacks may have asked for it."""
        limit = self.config.max_steps
        self.state.stopping = self.world.broadcast_object(self.state.stopping)
        return bool(self.state.stopping) or (limit is not None and self.state.step >= limit)

    # -- the beginning -------------------------------------------------------------------------------------------------

    def _begin(self) -> int:
        """Continue from a checkpoint if there is one to continue from; return the epoch to begin with, from 0.

        Nothing is written before the checkpoint was accepted: a refused one leaves the folder as it was.
        """
        path = on_main(self.world, lambda: find_checkpoint(self.config))
        epoch = 0 if path is None else self._resume(path)
        self.judge.lose_patience(self.state)
        on_main(self.world, lambda: self._open_folder(anew=not is_own(path, self.config.out_dir)))
        if path is not None:
            self.teller.say(f"resumed: {path}, after {self.state.step:,} steps, {self.teller.place(epoch)}")
        self._introduce()
        return epoch

    def _resume(self, path: Path) -> int:
        place, self.rank_rng = self.progress.restore(path)
        if place["seed"] != self.config.seed and self.world.is_main:
            logger.warning(
                "seed=%d is not the one that %s was written with; the order of samples goes on with seed %d",
                self.config.seed,
                path,
                place["seed"],
            )
        self.order_seed = int(place["seed"])
        return int(place["epoch"])

    def _open_folder(self, *, anew: bool) -> None:
        self.folder.start(self.config.plain(), self.state.history, anew=anew)
        if self.weights_path is not None:
            checkpoint.check_writable(self.weights_path)

    def _introduce(self) -> None:
        if not self.world.is_main:
            return
        lines = introduction(
            self.config,
            model=self.job.model,
            train_data=self.job.train_data,
            optimizer=self.stepper.optimizer,
            strategy=self.strategy,
            devices=self.job.devices,
            reasons=(self.job.reason, self.strategy_reason),
        )
        self.teller.say(*lines, *filter(None, [self.judge.words]))

    # -- one epoch -----------------------------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int) -> bool:
        """Take the steps of an epoch; return whether it was gone through to its end."""
        state, stepper, reporter = self.state, self.stepper, self.teller.reporter
        state.epoch = epoch + 1
        self.train.set_position(DataPosition(self.order_seed, epoch, state.samples_in_epoch))
        self.teller.begin_epoch(self.steps_per_epoch)
        watching = self.watch_steps or self.config.checkpoint_every_steps or self.config.max_steps
        clock = time.perf_counter
        for window in windows(self.train, self.config.gradient_accumulation_steps):
            if not self.wrapped:
                self._wrap(window)
            taken = stepper.step(window)
            state.step += 1
            state.samples += taken
            state.samples_in_epoch += taken
            if clock() >= reporter.due:
                self.teller.show(self.world.device)
            if watching and self._after_step(epoch):
                return False
        return True

    def _wrap(self, window: list[Any]) -> None:
        """Put the strategy's wrapper around the objective, which DDP can only do when it is known what takes part."""
        objective, options = self.objective, self.config
        if self.config.compile:
            objective.compile()
        if self.world.size > 1 and "find_unused_parameters" not in options.ddp_options:
            unused = options.find_unused_parameters
            if unused is None and not options.ddp_options.get("static_graph"):
                names = unused_parameters(objective, window[0].batch, self.world)
                unused = names is None or bool(names)
                self.teller.unused(names or [])
            self.strategy.options["find_unused_parameters"] = bool(unused)  # type: ignore[attr-defined]
        self.stepper.use(self.strategy.wrap(objective), objective, compiled=self.config.compile)
        if self.rank_rng is not None:
            set_rng_state(self.rank_rng)
        self.wrapped = True

    def _after_step(self, epoch: int) -> bool:
        """Do what is asked for after steps; return whether training stops here."""
        state, config = self.state, self.config
        if self.watch_steps:
            self.callbacks.call("on_step_end", state)
            if self._is_over():
                return True
        every = config.checkpoint_every_steps
        if every is not None and state.step % every == 0:
            self._write_checkpoint(epoch, state.samples_in_epoch)
        return config.max_steps is not None and state.step >= config.max_steps

    def _end_epoch(self, epoch: int, *, whole: bool) -> None:
        """Evaluate and record. Of an epoch that was left early the checkpoint has the middle, from where it can go on."""
        state, tally, teller = self.state, self.stepper.tally, self.teller
        loss = tally.global_mean(self.world)
        record = teller.record(math.nan if loss is None else teller.checked_loss(loss))
        record.update({f"train_{name}": value for name, value in self.train_metrics.compute(self.world).items()})
        self.train_metrics.reset()
        teller.reporter.end_epoch()
        if whole:
            self.stepper.schedule.after_epoch()
        if whole and self.evaluations is None:
            self.stepper.schedule.after_evaluation(record["train_loss"])
        is_best = self._evaluation_is_due(epoch) and self._evaluate(record, whole=whole)
        if not whole:
            self._write_checkpoint(epoch, state.samples_in_epoch)
        tally.reset()
        state.history.append(record)
        self.callbacks.call("on_epoch_end", state)
        if whole:
            state.samples_in_epoch = 0
            self._write_checkpoint(epoch + 1, 0)
        teller.end_epoch(record, is_best=is_best)  # once it is saved: whoever reads that it is done may interrupt

    def _evaluation_is_due(self, epoch: int) -> bool:
        if self.evaluations is None:
            return False
        config = self.config
        ending = epoch + 1 == config.epochs or (config.max_steps is not None and self.state.step >= config.max_steps)
        return ending or (epoch + 1) % config.eval_every_epochs == 0 or self._is_over()

    def _evaluate(self, record: dict[str, Any], *, whole: bool) -> bool:
        """Evaluate, add the results to ``record`` and return whether they are the best so far."""
        state = self.state
        self.strategy.synchronize_buffers(self.objective)
        assert self.evaluations is not None  # the caller has looked
        state.validation = evaluate(self.objective, self.evaluations, self.metrics, self.world)
        self.teller.checked_loss(state.validation.get("loss", 0.0), "evaluation's loss")
        record.update({f"{PREFIX}{name}": value for name, value in state.validation.items()})
        is_best = self.judge.take(state, whole=whole)
        if is_best and self.world.is_main:
            self.best_weights.keep(self.job.model)
        if whole:
            self.stepper.schedule.after_evaluation(self._plateau_value())
        self.callbacks.call("on_evaluate", state)
        return is_best

    def _plateau_value(self) -> float | None:
        value = self.judge.value(self.state.validation)
        return self.state.validation.get("loss") if value is None else value

    def _write_checkpoint(self, epoch: int, samples: int) -> None:
        if self.config.out_dir is not None:
            place = DataPosition(self.order_seed, epoch, samples).to_dict()
            self.progress.write(checkpoint_path(self.config.out_dir), place)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _finish(self) -> FitOutcome:
        state = self.state
        if state.stopping:
            self.teller.say(f"stopped early: {state.stopping}")
        self._evaluate_last_weights()
        self._settle_weights()
        test: Results = {}
        if self.tests is not None:
            test = evaluate(self.objective, self.tests, self.metrics, self.world)
            self.teller.results("test", test)
        self.folder.finish(state.history)
        self.callbacks.call("on_fit_end", state)
        validation = state.validation if state.best is None else state.best.results
        return FitOutcome(validation, test, state.history, state.best, state.stopping)

    def _evaluate_last_weights(self) -> None:
        """Evaluate once more where the model ends with weights that were not: training stopped between two evaluations."""
        state = self.state
        record = state.history[-1] if state.history and state.history[-1]["step"] == state.step else {}
        if self.evaluations is None or state.best is not None or any(name.startswith(PREFIX) for name in record):
            return
        self._evaluate(record, whole=False)
        if record:
            self.folder.record(state.history)
        self.teller.results("validation", state.validation)

    def _settle_weights(self) -> None:
        """Leave the best weights in the user's model, or the last ones, and on disk where that was asked for."""
        best, model = self.state.best, self.job.model
        if self.world.is_main:
            if best is not None:
                self.best_weights.load(model)
            if self.weights_path is not None:
                checkpoint.save(model, self.weights_path)
        self.strategy.broadcast_parameters(self.objective)
        if best is not None:
            self.teller.best(best, self.judge.name)
        if self.weights_path is not None:
            self.teller.say(f"weights: {self.weights_path}")
