"""The section `adapt`: what of a model is trained where that is not all of it, and what is put into it to be trained.

Beside sections.py, which lists it; the room `adapt` does what it says.
"""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from shardwright.config.fields import Strict, free, meaning

Method = Literal["none", "lora", "prompt", "prefix", "p_tuning"]
Target = Literal["q", "k", "v", "out", "gate", "up", "down"]


class AdaptConfig(Strict):
    """`adapt`: adapters, and parameters that stay as they are."""

    method: Method = meaning("none", "What is put into the model and trained in its place; it stays as it is then")
    begin: str | None = free(None, "Folder of an adapter as peft writes it, whose weights the run begins with")
    rank: int = meaning(8, "lora: rank of what is added to a matrix", ge=1)
    alpha: float = meaning(16.0, "lora: what is added is multiplied by alpha / rank", gt=0)
    rslora: bool = meaning(False, "lora: multiplied by alpha / root of rank")
    dropout: float = meaning(0.0, "lora: dropout of what goes into the added part", ge=0, lt=1)
    targets: list[Target] = meaning(["q", "v"], "lora: linear layers of the blocks, by their last name", min_length=1)
    tokens: int = meaning(20, "prompt, prefix, p_tuning: virtual tokens before a row", ge=1)
    projection: int | None = meaning(
        None, "prefix: width of a layer that keys and values come out of; null trains them themselves", ge=1
    )
    encoder_width: int | None = meaning(
        None, "p_tuning: width of the layers that virtual tokens come out of; null is that of token vectors", ge=1
    )
    freeze: list[str] = meaning([], "Parameters that stay as they are, by patterns such as blocks.0.* or *.bias")
    train: list[str] = meaning([], "Parameters that are trained all the same, by patterns")

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: list[Target]) -> list[Target]:
        if len(set(targets)) < len(targets):
            raise ValueError(f"got {targets}; expected each name once")
        return targets

    @model_validator(mode="after")
    def _check_method(self) -> AdaptConfig:
        if self.method == "none":
            if self.begin is not None:
                raise ValueError("begin names an adapter, and method is none; set method to what it is")
            if self.train and not self.freeze:
                raise ValueError("train has no effect where nothing is frozen; name what is with freeze")
        elif self.freeze:
            raise ValueError(f"freeze: all of the model is frozen under method={self.method}; name the rest with train")
        return self

    @property
    def scale(self) -> float:
        """What LoRA's product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def freezes(self) -> bool:
        """Whether anything stays as it is."""
        return self.method != "none" or bool(self.freeze)

    @property
    def virtual(self) -> int:
        """Virtual tokens that come before a row."""
        return self.tokens if self.method in ("prompt", "p_tuning", "prefix") else 0
