"""What a run reads and how it changes it: the `data`, `augment` and `mixing` sections of a recipe."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Settings(BaseModel):
    """Base of every recipe section: strict types, unknown keys refused, frozen after reading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class DataSettings(Settings):
    name: str = Field(
        description="data set: digits, cifar10, cifar100, folder (train/ and val/ with one folder a class), "
        "tar (train.tar and val.tar), wds (WebDataset shards), or an event set: gesture, cifar10dvs, nmnist, digits_dvs"
    )
    root: str = Field(default="data", description="folder that holds the data set; `~` and $VARIABLES are expanded")
    image_size: int = Field(default=32, ge=1, description="height and width given to the model, pixels")
    channels: int = Field(default=3, ge=1, description="channels of one picture or frame")
    mean: tuple[float, ...] | None = Field(
        default=None, description="per-channel mean of pictures scaled to [0, 1]; null: the data set's own"
    )
    std: tuple[float, ...] | None = Field(
        default=None,
        description="per-channel standard deviation of pictures scaled to [0, 1]; null: the data set's own",
    )
    interpolation: Literal["bilinear", "bicubic", "nearest"] = Field(
        default="bicubic", description="how pictures are resized"
    )
    crop_fraction: float = Field(
        default=1.0, gt=0, le=1, description="evaluation: side of the centre crop over the resized side"
    )
    validation_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the training part held out by class (event sets: by person) to choose the best epoch; "
        "0: chosen on the test part, as published",
    )
    unreadable: Literal["stop", "skip"] = Field(
        default="stop", description="a picture that cannot be decoded: stop and name it, or skip it and count"
    )
    train_shards: str = Field(
        default="train-{00000..00000}.tar", description="wds: brace pattern of the training shards"
    )
    test_shards: str = Field(default="val-{00000..00000}.tar", description="wds: brace pattern of the test shards")
    # event sets
    frames: int = Field(default=16, ge=1, description="event sets: frames a recording is cut into (the model's T)")
    split_by: Literal["number", "time"] = Field(
        default="number", description="event sets: frames hold equally many events, or last equally long"
    )
    split: str = Field(default="published", description="event sets: name of the division into training and test part")
    cache: str | None = Field(default=None, description="event sets: folder for ready frames; null: beside the data")

    @field_validator("std")
    @classmethod
    def _divides(cls, std: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if std is not None and not all(value > 0 for value in std):
            raise ValueError("each must be above 0, since pictures are divided by it")
        return std


class AugmentSettings(Settings):
    engine: Literal["per_sample", "batched"] = Field(
        default="per_sample",
        description="per_sample: timm's PIL transforms in worker processes, as published; "
        "batched: one tensor operation for the whole batch on the training device",
    )
    crop_padding: int = Field(
        default=0, ge=0, description="random shift by up to this many pixels; zeros fill the border"
    )
    crop_scale: tuple[float, float] = Field(
        default=(1.0, 1.0), description="random resized crop: least and largest share of the area"
    )
    crop_ratio: tuple[float, float] = Field(
        default=(1.0, 1.0), description="random resized crop: least and largest width over height"
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    rand_augment: str = Field(
        default="", description="timm's RandAugment string, e.g. rand-m9-n1-mstd0.4-inc1; empty: off"
    )
    erase_probability: float = Field(default=0.0, ge=0, le=1, description="probability of random erasing")
    events: Literal["none", "published"] = Field(
        default="none", description="event sets: published: one of identity, shear, shifts, rotation, cutout a sample"
    )
    flip_swaps_labels: bool = Field(
        default=True, description="event sets: a flip of a gesture also swaps left and right (published: false)"
    )
    train_frames: int = Field(
        default=0,
        ge=0,
        description="event sets: a random subset of this many frames for each training batch; 0: all frames",
    )

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _is_span(cls, span: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        most, words = (1.0, " and at most 1") if info.field_name == "crop_scale" else (float("inf"), "")
        if not 0 < span[0] <= span[1] <= most:
            raise ValueError(f"both must be above 0{words}, the first not above the second")
        return span


class MixSettings(Settings):
    mixup_alpha: float = Field(default=0.0, ge=0, description="Beta(alpha, alpha) of mixup's weight; 0: off")
    cutmix_alpha: float = Field(default=0.0, ge=0, description="Beta(alpha, alpha) of CutMix's kept area; 0: off")
    probability: float = Field(default=1.0, ge=0, le=1, description="probability that a batch is mixed")
    switch_probability: float = Field(
        default=0.5, ge=0, le=1, description="probability of CutMix instead of mixup where both are on"
    )
    off_epoch: int | None = Field(default=None, ge=0, description="mixing stops from this epoch on, counted from 0")
