"""What a data set can be told."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lvlmva_core.settings import Count, Seed, Settings, Share


class Knee(Settings):
    """How many knees a class, and on which share of the training knees a lead marker stands.

    val_groups: balanced, or as_training: with the shares of the training split.
    """

    train_per_class: Count
    val_per_class: Count
    test_per_class: Count
    tag_share_healthy: Share
    tag_share_arthritic: Share
    val_groups: Literal["balanced", "as_training"] = "balanced"
    negatives: Literal["leave_out", "invert"]


class Skin(Settings):
    """How many lesions a class, which bandages, and on which share of the training pictures they lie.

    val_groups: balanced, or as_training: with the shares of the training split.
    """

    train_per_class: Count
    val_per_class: Count
    test_per_class: Count
    bandages: Literal["real", "pasted"]
    bandage_share_benign: Share
    bandage_share_malignant: Share
    val_groups: Literal["balanced", "as_training"] = "balanced"

    @model_validator(mode="after")
    def _real_bandages_are_on_benign_lesions(self) -> "Skin":
        if self.bandages == "real" and self.bandage_share_malignant > 0:
            raise ValueError("bandage_share_malignant must be 0 with bandages 'real': no malignant lesion has one")
        return self


class Prepare(Settings):
    """Which dataset, and how it is split and decoyed. image_size and the own section are for knee and skin alone."""

    dataset: Literal["decoy_digits", "decoy_mnist", "knee", "skin"]
    root: str | None
    seed: Seed
    image_size: Annotated[int, Field(ge=32, le=1024)] | None = None
    knee: Knee | None = None
    skin: Skin | None = None

    @model_validator(mode="after")
    def _settings_fit_the_dataset(self) -> "Prepare":
        own = {"knee": self.knee, "skin": self.skin}
        for name, section in own.items():
            if (section is None) == (self.dataset == name):
                raise ValueError(f"dataset '{self.dataset}' needs its own section alone; see prepare.{name} in presets")
        if (self.image_size is None) == (self.dataset in own):
            raise ValueError("image_size must be set for knee and skin, and for no other dataset")
        return self
