"""Log to W&B, trackio and TensorBoard with the callbacks of transformers.

Trackers write below the folder of the run, unless `WANDB_DIR` or `TRACKIO_DIR` is set. In addition to the metrics they
get the recipe, and after every epoch a histogram of the scales of each layer.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from san_bench.config.recipe import Recipe
from san_bench.run.scales import scale_vectors
from san_peft.errors import SanError

PROJECT = "san-peft"
"""Project name in W&B and trackio, unless `WANDB_PROJECT` or `TRACKIO_PROJECT` is set."""

STEP = "train/global_step"
"""Key that transformers' callbacks log the step under."""


def tracking(names: Sequence[str], recipe: Recipe, folder: Path) -> tuple[dict[str, Any], list[TrainerCallback]]:
    """Returns the training arguments and callbacks of experiment trackers.

    Args:
        names: Some of `wandb`, `trackio` and `tensorboard`.
        recipe: Recipe of the run, which is logged as its configuration.
        folder: Folder of the run, which the trackers write below.

    Returns:
        Fields for `TrainingArguments`, and callbacks. `report_to` is empty, since the callbacks replace those that
        the Trainer would add.

    Raises:
        SanError: If a name is unknown, or a tracker is not installed.
    """
    unknown = [name for name in names if name not in TRACKERS]
    missing = [name for name in names if name in TRACKERS and importlib.util.find_spec(name) is None]
    problems = []
    if unknown:
        problems.append(f"Unknown tracker {', '.join(unknown)}. Choose from {', '.join(TRACKERS)}.")
    if missing:
        problems.append(f'Not installed: {", ".join(missing)}. pip install "san-peft[track]"')
    if problems:
        raise SanError("\n".join(problems))
    name = f"{recipe.task} {recipe.method.kind} seed {recipe.seed} {recipe.fingerprint[:8]}"
    fields = {"report_to": [], "run_name": name, "project": os.environ.get("TRACKIO_PROJECT", PROJECT)}
    return fields, [TRACKERS[name](recipe, folder) for name in dict.fromkeys(names)]


class _TensorBoard(TensorBoardCallback):
    """Writes event files to `tensorboard/`."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        super().__init__()
        self.recipe, self.logging_dir = recipe, str(folder / "tensorboard")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.tb_writer is not None:
            self.tb_writer.add_text("recipe", f"```yaml\n{self.recipe.to_yaml()}```")

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for fqn, scale in scale_vectors(model).items():
            if self.tb_writer is not None:
                self.tb_writer.add_histogram(f"scale/{fqn}", scale, state.global_step)


class _Wandb(WandbCallback):
    """Writes to `wandb/`: online if logged in, else offline for a later `wandb sync`."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        super().__init__()
        self.recipe, self.folder = recipe, folder

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=args.run_name,
                config={"recipe": self.recipe.model_dump(mode="json")},
                dir=os.environ.get("WANDB_DIR") or self.folder,
                mode=None if "WANDB_MODE" in os.environ else _mode(),
                reinit="finish_previous",
            )
        super().setup(args, state, model, **kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        scales = scale_vectors(model)
        if state.is_world_process_zero and scales:
            histograms = {f"scale/{fqn}": self._wandb.Histogram(scale.tolist()) for fqn, scale in scales.items()}
            self._wandb.log({**histograms, STEP: state.global_step})

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, model, processing_class, **kwargs)
        if state.is_world_process_zero:
            self._wandb.finish()  # else a later run in this process would continue this one
            self._wandb.teardown()  # else its service might still write when this process ends


def _mode() -> Literal["online", "offline"]:
    """Returns the default mode of W&B, without prompting for a key and without a network call."""
    import wandb

    return "online" if wandb.login(prompt=False, verify=False) else "offline"


class _Trackio(TrackioCallback):
    """Writes to `trackio/`."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        home = os.environ.get("TRACKIO_DIR")
        if home is None:  # trackio reads the variable only when it is imported
            os.environ["TRACKIO_DIR"] = str(folder / "trackio")
        try:
            super().__init__()
        finally:
            if home is None:
                del os.environ["TRACKIO_DIR"]
        wanted = Path(home or folder / "trackio")
        if wanted != self._trackio.TRACKIO_DIR:
            raise SanError(
                f"trackio already writes to {self._trackio.TRACKIO_DIR} in this process, not to {wanted}. "
                "Start another process, or set TRACKIO_DIR to one folder for all runs before trackio is imported."
            )
        self.recipe = recipe

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            self._trackio.config["recipe"] = self.recipe.model_dump(mode="json")

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        scales = scale_vectors(model)
        if state.is_world_process_zero and scales:
            histograms = {f"scale/{fqn}": self._trackio.Histogram(scale) for fqn, scale in scales.items()}
            self._trackio.log({**histograms, STEP: state.global_step})


TRACKERS = {"wandb": _Wandb, "trackio": _Trackio, "tensorboard": _TensorBoard}
