"""A run's recipe: one YAML file, strictly typed; every field is read somewhere, an unknown one is an error."""

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from spikingformer.data.settings import AugmentSettings, DataSettings, MixSettings, Settings
from spikingformer.files import write_atomic
from spikingformer.training.recipe_text import dump_yaml, explain_errors, parse_yaml, split_override, to_json


class ModelSettings(Settings):
    name: str = Field(description="model name in timm's registry; `spikingformer models` lists ours")
    time_steps: int = Field(default=4, ge=1, description="simulation steps T for a still picture")
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1, description="stochastic depth of the last block")
    embed_dim: int | None = Field(default=None, ge=1, description="width; null: the model's own")
    depth: int | None = Field(default=None, ge=1, description="transformer blocks; null: the model's own")
    num_heads: int | None = Field(default=None, ge=1, description="attention heads; null: the model's own")
    mlp_ratio: float | None = Field(default=None, gt=0, description="hidden width over width; null: the model's own")
    pooled_stages: tuple[int, ...] | None = Field(
        default=None, description="stem stages that halve the picture, counted from 0; null: the model's own"
    )
    tau: float | None = Field(default=None, ge=1, description="membrane time constant in steps; null: the model's own")
    surrogate: str | None = Field(default=None, description="surrogate gradient; null: the model's own (sigmoid)")
    initial_checkpoint: str | None = Field(
        default=None, description="safetensors weights to start from (fine-tuning); null: random weights"
    )


class OptimizerSettings(Settings):
    name: str = Field(default="adamw", description="any optimiser of timm.optim.list_optimizers()")
    learning_rate: float = Field(default=5e-4, gt=0, le=1e6, description="peak learning rate for the whole batch")
    weight_decay: float = Field(default=0.05, ge=0, description="decay of weights; biases and norms have none")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum, for optimisers that have one")
    clip_norm: float | None = Field(default=None, gt=0, description="largest gradient norm; null: not clipped")


class ScheduleSettings(Settings):
    name: Literal["cosine", "tanh", "step", "poly", "constant"] = Field(default="cosine", description="timm's schedule")
    warmup_epochs: int = Field(default=0, ge=0, description="epochs of linear rise, part of `epochs`")
    warmup_learning_rate: float = Field(default=1e-5, ge=0, description="learning rate at the start of the rise")
    min_learning_rate: float = Field(default=1e-5, ge=0, description="learning rate at the end")
    cooldown_epochs: int = Field(default=0, ge=0, description="epochs at min_learning_rate after `epochs`")
    decay_epochs: int = Field(default=30, ge=1, description="step: epochs between decays")
    decay_rate: float = Field(default=0.1, gt=0, description="step: factor of each decay; poly: the power")
    every_step: bool = Field(default=False, description="change at each optimiser step, not at each epoch")
    early_epochs: int = Field(
        default=0,
        ge=0,
        description="still pictures: first epochs, part of `epochs`, whose steps run for early_time_steps; evaluation "
        "runs for model.time_steps always",
    )
    early_time_steps: int = Field(
        default=1, ge=1, description="time steps T in the first early_epochs: fewer are faster"
    )


class EmaSettings(Settings):
    decay: float = Field(default=0.0, ge=0, lt=1, description="moving average of weights kept per step; 0: none")
    warmup: bool = Field(default=False, description="let the decay rise from 0 (timm's ModelEmaV3 warm-up)")


class CheckpointSettings(Settings):
    every_epochs: int = Field(
        default=1, ge=1, description="epochs between saved states; also at each new best epoch and at the last"
    )
    every_steps: int = Field(default=0, ge=0, description="also save after this many steps; 0: at epoch ends only")
    every_seconds: float = Field(default=0.0, ge=0, description="also save after this many seconds; 0: off")


class LogSettings(Settings):
    every_steps: int = Field(default=50, ge=1, description="steps between records of the training loss")
    tensorboard: bool = Field(default=True, description="write TensorBoard curves into the run's folder")
    rate_samples: int = Field(
        default=64, ge=0, description="samples counted at each evaluation for firing rate and estimated energy; 0: off"
    )


class Recipe(Settings):
    model: ModelSettings
    data: DataSettings
    augment: AugmentSettings = AugmentSettings()
    mixing: MixSettings = MixSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    ema: EmaSettings = EmaSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()

    epochs: int = Field(ge=1, le=1_000_000, description="passes over the training part, without cooldown")
    batch_size: int = Field(
        default=64, ge=1, description="samples per optimiser step, over all processes and accumulation steps"
    )
    accumulation_steps: int = Field(
        default=1, ge=1, description="micro-batches that each process splits its batch into"
    )
    evaluation_batch_size: int = Field(default=128, ge=1, description="samples per evaluation batch and process")
    drop_last: bool = Field(default=True, description="skip an epoch's last batch if it is smaller")
    sparsity: float = Field(
        default=0.0,
        ge=0,
        description="weight, in the loss, of the synaptic operations as a share of those if every neuron fired; 0: off",
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all classes")
    seed: int = Field(default=42, ge=0, lt=2**63, description="fixes weights, order, augmentation and mixing")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        default="fp32", description="bf16, fp16: autocast (fp16 with loss scaling); fp64: for comparisons"
    )
    compile: bool = Field(default=False, description="run the model through torch.compile")
    cuda_graph: bool = Field(
        default=True,
        description="CUDA, one process: replay forward and backward as one graph if the step allows it (the same "
        "numbers, fewer launches)",
    )
    grad_checkpointing: bool = Field(
        default=False, description="CUDA: compute spikes again in backward instead of keeping them (less memory)"
    )
    channels_last: bool = Field(default=False, description="keep 4-D weights and pictures in channels_last memory")
    deterministic: bool = Field(default=False, description="CUDA: ask PyTorch for deterministic kernels (slower)")
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="several processes: ddp, each holds the whole model; fsdp, each holds a share of it (FSDP2)",
    )
    sync_batchnorm: bool = Field(default=False, description="several processes: BatchNorm over the whole batch")
    workers: int = Field(default=2, ge=0, le=1024, description="processes that decode and augment (per_sample engine)")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of a process; null: PyTorch's choice"
    )
    nonfinite: Literal["stop", "skip", "step_back"] = Field(
        default="stop",
        description="a loss that is not finite: stop; skip the step and count; "
        "or go back to the last checkpoint with half the learning rate",
    )
    evaluate_every: int = Field(default=1, ge=1, description="epochs between evaluations; the last one always")

    @property
    def total_epochs(self) -> int:
        """Epochs with cooldown."""
        return self.epochs + self.schedule.cooldown_epochs


# keys, and whole sections, that say where and how a run is computed, not what
FREE = (
    "data.root",
    "data.cache",
    "device",
    "workers",
    "threads",
    "evaluation_batch_size",
    "checkpoint",
    "log",
    "compile",
    "cuda_graph",
    "grad_checkpointing",
    "parallel",
)


def is_free(key: str) -> bool:
    """Whether a dotted key may change within a run, and between runs that count as the same."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def recipes_folder() -> Path:
    """Folder of the recipes that come with the package."""
    return Path(__file__).resolve().parent.parent / "recipes"


def find_recipe(path: str) -> Path:
    """The file itself, or the packaged recipe of that name (`recipes/digits/x.yaml`, `digits/x.yaml`, `digits/x`)."""
    given = Path(path).expanduser()
    if given.is_file():
        return given
    if not given.is_absolute() and ".." not in given.parts:
        parts = given.parts[1:] if given.parts[:1] == ("recipes",) else given.parts
        for candidate in (recipes_folder().joinpath(*parts), recipes_folder().joinpath(*parts).with_suffix(".yaml")):
            if candidate.is_file():
                return candidate
    known = sorted(str(Path("recipes") / p.relative_to(recipes_folder())) for p in recipes_folder().rglob("*.yaml"))
    if given.is_dir():
        raise ValueError(f"{path}: a folder without recipe.yaml: give a recipe file, or the folder of a run")
    hint = next(iter(get_close_matches(str(given), known, n=1)), None)
    raise ValueError(
        f"no recipe file {path!r}"
        + (f"; did you mean {hint}?" if hint else "")
        + "; `spikingformer train --list` lists them"
    )


def build_recipe(values: object, source: str) -> Recipe:
    """Makes a recipe of plain values (dicts, lists, numbers).

    Raises:
        ValueError: unknown key (names the nearest right one) or wrong type (got, expected, the field's meaning).
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected sections and `key: value` lines, got {type(values).__name__}")
    try:
        return Recipe.model_validate_json(to_json(values, source))  # JSON mode: strict, but lists become tuples
    except ValidationError as error:
        raise ValueError(explain_errors(error, Recipe, source)) from None


def check_event_steps(recipe: Recipe, given: bool = False) -> None:
    """Raises ValueError if model.time_steps is not the number of event frames, which the model would follow.

    given: it was set on purpose; False: the default is let through, since saved recipes contain it.
    """
    asked, frames = recipe.model.time_steps, recipe.data.frames
    default = ModelSettings.model_fields["time_steps"].default
    if asked != frames and (given or asked != default):
        raise ValueError(
            f"model.time_steps: got {asked}, but event frames bring their own time steps: set data.frames={asked} "
            f"(it is {frames})"
        )


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe file and applies `key=value` overrides (dotted keys, YAML values; later ones win).

    Raises:
        ValueError: no such file, not a recipe, an unknown key, a wrong value, or an override that would not be read.
    """
    file = find_recipe(str(path))
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not a text file (YAML in UTF-8)") from None
    values = parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected sections and `key: value` lines, got {type(values).__name__}")
    source = str(file)
    for text in overrides:
        keys, value = split_override(text)
        target = values
        for key in keys[:-1]:
            inner = target.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"override {text!r}: {key!r} is a value, not a section")
            target = inner
        target[keys[-1]] = value
        source = f"{file} with overrides"
    recipe = build_recipe(values, source)
    if ["model", "time_steps"] in (split_override(text)[0] for text in overrides):
        from spikingformer.data.sources import event_names

        if recipe.data.name in event_names():
            check_event_steps(recipe, given=True)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes every field, defaults included, so that the run can be repeated from this file alone."""
    write_atomic(path, dump_yaml(recipe.model_dump(mode="json")).encode())
