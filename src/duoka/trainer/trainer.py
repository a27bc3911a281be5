"""Public class ``Trainer``: trains a model on all devices from the user's script or notebook."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from duoka import checkpoint, devices
from duoka.errors import ConfigError, DivergenceError, TrainingInterrupted
from duoka.launcher import launch
from duoka.launcher.cluster_environment import is_in_cluster_job
from duoka.log import logger
from duoka.trainer.callbacks import Best, Callback
from duoka.trainer.checked_loader import build_loader, in_dataset_order
from duoka.trainer.checkpoint_files import checkpoint_path
from duoka.trainer.config import TrainerConfig
from duoka.trainer.evaluation import evaluate, predict
from duoka.trainer.fit_loop import FitOutcome, fit_on_rank
from duoka.trainer.fit_spec import FitSpec, RankZeroOnly, build_model_with_loss
from duoka.trainer.metrics import Metrics, Results
from duoka.trainer.model_with_loss import check_callables
from duoka.utils.files import write_time_ns
from duoka.utils.signals import interruption
from duoka.world import current_world, has_current_world


class FitResult(NamedTuple):
    """Result of ``fit``: ``validation, test = trainer.fit()``."""

    validation: Results
    """Loss and metrics of the final weights on ``eval_data``; empty without ``eval_data``."""
    test: Results
    """The same on ``test_data``."""


class Trainer:
    """Trains a model on one device or many, with the same result for a given global batch.

    Args:
        model: any module. ``fit`` trains this object in place.
        train_data: a ``DataLoader``, or any iterable of batches: tuples ``(input, ..., target)``, dicts, nested.
        eval_data, test_data: the same, for evaluation after epochs and after training; each sample counts once.
        loss: ``loss(output, target)``, a function or a module; or the name of a model method that takes a batch; or
            ``None`` for a model that returns its own loss. It returns the mean over the batch, or ``(sum, weight)``.
        metrics: torchmetrics: one, a list, a dict of names and metrics, or a ``MetricCollection``.
        train_metrics: the same for the training batches of each epoch: ``train_NAME`` in the history. They need a
            ``loss(output, target)``. In an epoch that was resumed midway, they cover the rest of the epoch.
        callbacks: called on rank 0.
        config: a ``TrainerConfig``; options given by name override it.
        options: the fields of ``TrainerConfig``: ``device``, ``epochs``, ``lr``, ``optimizer``, ``precision``, ...;
            ``help(duoka.TrainerConfig)`` explains each.

    Raises:
        ConfigError: an option is unknown (the message suggests the right one) or has a value that is not valid.
        DeviceError: a device does not exist.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> data = DataLoader(TensorDataset(x, 3 * x), batch_size=16, shuffle=True)
        >>> model = torch.nn.Linear(1, 1)
        >>> trainer = Trainer(
        ...     model, data, data, loss=torch.nn.functional.mse_loss, optimizer="adam", lr=0.1, epochs=50, device="cpu",
        ...     verbose=False,
        ... )
        >>> validation, test = trainer.fit()
        >>> validation["loss"] < 0.01
        True

    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Any = None,
        eval_data: Any = None,
        test_data: Any = None,
        *,
        loss: Callable[..., Any] | str | None = None,
        metrics: Any = None,
        train_metrics: Any = None,
        callbacks: Iterable[Callback] = (),
        config: TrainerConfig | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, type):
            raise ConfigError(f"model is the class {model.__name__} itself; call it: {model.__name__}(...)")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
        self.model: nn.Module = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
        before = {} if config is None else dict(vars(config))
        if "devices" in options:
            before.pop("device", None)
        self.config = TrainerConfig.of({**before, **options})
        check_callables(self.model, loss, self.config.predict_fn)
        self.callbacks = _checked_callbacks(callbacks)
        self.train_data, self.eval_data, self.test_data = train_data, eval_data, test_data
        self.loss, self.metrics, self.train_metrics = loss, metrics, train_metrics
        if train_metrics is not None and (loss is None or isinstance(loss, str) or self.config.strategy == "dp"):
            raise ConfigError(
                f"train_metrics need loss(output, target) and one process per device, but loss={loss!r} and strategy="
                f"{self.config.strategy!r}; give a loss function, or use metrics with eval_data"
            )
        self.history: list[dict[str, Any]] = []
        """One record per epoch of the last ``fit``, as in ``metrics.jsonl``."""
        self.best: Best | None = None
        """The best evaluation of the last ``fit``; ``None`` without ``monitor``."""
        self.stopped: str = ""
        """Reason why the last ``fit`` ended early; empty if it did not."""
        choice = devices.resolve(self.config.device)
        self.devices, self.reason = choice.devices, choice.reason
        limit = "strategy='single'" if self.config.use_multi_gpu else "use_multi_gpu=False"
        is_limited = self.config.strategy == "single" or not self.config.use_multi_gpu
        if is_limited and len(choice.devices) > 1:
            self.devices, self.reason = choice.devices[:1], f"{choice.reason.rstrip('.')}; {limit} uses the first"

    def fit(self, save_model: bool = True, model_path: str | Path | None = None) -> FitResult:
        """Train, and return the results on ``eval_data`` and ``test_data``.

        Afterwards the model has the best weights with ``monitor`` or ``early_stop_patience``, else the last weights.

        A part of the model that you have put into evaluation mode stays in it: after ``model.backbone.eval()``, batch
        norm of the backbone keeps its statistics, and its dropout is off. The log names such parts. (Hugging Face's
        ``from_pretrained`` returns a model in evaluation mode: call ``train()`` on it.) If the whole model is in
        evaluation mode, all of it trains.

        Args:
            save_model: whether to write the weights to disk.
            model_path: the file (``.safetensors``, ``.pt`` or ``.pth``); ``None`` is ``model.safetensors`` in
                ``out_dir``, or no file if there is no ``out_dir``.

        Raises:
            ConfigError: the options do not fit the data or each other.
            CheckpointError: there is no checkpoint to resume from, or it is of another model.
            StorageError: the disk is full or a folder is not writable.
            DivergenceError: the loss has become NaN or infinite.
            torch.OutOfMemoryError: memory does not suffice; the message has the numbers and what helps.
            TrainingInterrupted: SIGTERM, SIGHUP or SIGUSR1 has arrived, and the program has no handler for it. All devices
                have stopped after the same step, and have saved if there is an ``out_dir``.
            Exceptions of the model, the loss and the data keep their type.

        """
        if self.train_data is None:
            raise ConfigError("fit needs training data: Trainer(model, train_data, ...)")
        for given, types in ((save_model, bool | int | np.bool_), (model_path, str | Path | None)):
            if not isinstance(given, types):
                raise ConfigError(
                    f"fit got a {type(given).__name__}; it takes save_model (True or False) and model_path. Give data to "
                    "Trainer: Trainer(model, train_data, eval_data, ...)"
                )
        default = None if self.config.out_dir is None else Path(self.config.out_dir) / "model.safetensors"
        path = (default if model_path is None else Path(model_path)) if save_model else None
        if path is not None:
            checkpoint.check_suffix(path)
        data = {"train_data": self.train_data, "eval_data": self.eval_data, "test_data": self.test_data}
        with self._resume_hint():
            outcome: FitOutcome = self._launch(fit_on_rank, weights_path=path, **data)
            self.history, self.best, self.stopped = outcome.history, outcome.best, outcome.stop_reason
            if outcome.signal:
                raise interruption(outcome.signal)
        return FitResult(outcome.validation, outcome.test)

    @contextlib.contextmanager
    def _resume_hint(self) -> Iterator[None]:
        """Add to an exception how training continues, if it has a checkpoint; ``resume="auto"`` does so without a word."""
        if self.config.out_dir is None or self.config.resume == "auto":
            yield
            return
        path = checkpoint_path(self.config.out_dir)
        before = write_time_ns(path)
        try:
            yield
        except BaseException as error:
            if write_time_ns(path) not in (None, before):
                hint = f"Trainer(..., resume=True) continues from the checkpoint {path}"
                if isinstance(error, DivergenceError):
                    hint = f"{hint}, and diverges again with the same options; begin a new run with a lower lr"
                error.add_note(hint)
                if isinstance(error, TrainingInterrupted) and current_world().is_main:
                    logger.warning("%s; %s", error, hint)  # Python shows no traceback of it
            raise

    def evaluate(self, data: Any = None) -> Results:
        """Return loss and metrics on ``data`` (``None``: ``eval_data``); each sample counts once."""
        data = self.eval_data if data is None else data
        if data is None:
            raise ConfigError("evaluate needs data: evaluate(data), or Trainer(..., eval_data=...)")
        return self._launch(_evaluate_on_rank, False, eval_data=data)  # type: ignore[no-any-return]

    def predict(self, data: Any) -> Any:
        """Return the model's predictions for ``data`` on the CPU: in the order of the data set, each sample once.

        A ``DataLoader`` with ``shuffle=True`` is also read in the order of its data set; one with your own sampler in
        the sampler's order. Samples that ``drop_last`` drops have no prediction. A model that returns a list with one
        item per sample (the boxes of each image) gives one list of all samples' items.

        A batch may hold a target, which the model does not get: a tuple longer than the required arguments of
        ``forward`` ends with one. ``Trainer(..., predict_fn=...)`` replaces this rule.
        """
        return self._launch(_evaluate_on_rank, True, eval_data=in_dataset_order(data))

    def _launch(self, function: Callable[..., Any], *arguments: Any, **data: Any) -> Any:
        """Run ``function`` on every device: on this process's own inside ``duoka.launch`` or a cluster job."""
        lazy = [name for name, parameter in self.model.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise ConfigError(
                f"the model has lazy parameters without a shape ({', '.join(lazy[:5])}); call it once with a batch first: "
                "model(inputs)"
            )
        spec = FitSpec(
            self.model,
            self.config,
            loss=self.loss,
            metrics=self.metrics,
            train_metrics=self.train_metrics,
            devices=self.devices,
            reason=self.reason,
            rank_zero=RankZeroOnly(self.callbacks),
            **data,
        )
        if has_current_world():
            return function(dataclasses.replace(spec, devices=(current_world().device,)), *arguments)
        if is_in_cluster_job(self.config.device):
            return launch(function, dataclasses.replace(spec, devices=()), *arguments, devices=self.config.device)
        used = self.devices[:1] if self.config.strategy == "dp" else self.devices
        return launch(function, spec, *arguments, devices=list(used))


def _evaluate_on_rank(spec: FitSpec, only_predict: bool) -> Any:
    """Return the results on ``spec.eval_data``, or the predictions for it."""
    world = current_world()
    data = build_loader(spec, "eval_data", spec.strategy(world)[0])
    with contextlib.closing(data), build_model_with_loss(spec, world) as module:
        if only_predict:
            return predict(module, data, world)
        return evaluate(module, data, Metrics(spec.metrics, world.device), world)


def _checked_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """Return ``callbacks`` as a tuple, if all are callbacks."""
    given = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    wrong = [one for one in given if not isinstance(one, Callback)]
    if wrong or not isinstance(callbacks, Iterable):
        one = (wrong or given)[0]
        what = f"the class {one.__name__} itself; call it" if isinstance(one, type) else repr(one)
        raise ConfigError(f"callbacks has {what}; give a list of duoka.Callback objects: callbacks=[MyCallback()]")
    return given


# for ``help`` and editors, a signature with every field of TrainerConfig in place of ``options``
_own = list(inspect.signature(Trainer.__init__).parameters.values())[1:-1]
Trainer.__signature__ = inspect.Signature([*_own, *inspect.signature(TrainerConfig).parameters.values()])  # type: ignore[attr-defined]
