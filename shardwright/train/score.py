"""`shardwright eval`: the validation figures of what a run has learned so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardwright.config import ConfigError
from shardwright.data.manifest import Manifest
from shardwright.parallel.mesh import World
from shardwright.train.build import build_objective, build_validation, check_corpus
from shardwright.train.draft import build_loss_model
from shardwright.train.evaluate import evaluate, split_text, xz_bits_per_byte
from shardwright.train.load import Loaded, load
from shardwright.train.specials import fit_special_tokens
from shardwright.train.stages import Loop, Stages


def evaluate_run(path: str | Path, data: str | None = None) -> dict[str, float]:
    """Loss, perplexity and bits per byte of a run or checkpoint on its own validation split, or that of `data`.

    In float32 and uncompiled. Beside bits per byte what xz needs for the text, if that is one local source. ConfigError
    where the run's own corpus is another now, or where a corpus was prepared with another tokenizer.
    """
    loaded = load(path)
    config = loaded.config
    config.distill = None  # the figures are the model's own, whoever taught it
    if data is not None:
        config.data = config.data.model_copy(update={"path": data, "sources": [], "corpus": []})
    if not config.data.mixture():
        raise ConfigError(f"{path}: names no corpus to evaluate on; name a prepared folder with --data")
    manifests = [Manifest.load(source.path, config.data.allow) for source in config.data.mixture()]
    _check_tokenizers(manifests, loaded)
    check_corpus(config, manifests)
    _fit_special_tokens(loaded)
    world = World(device=next(loaded.model.parameters()).device)
    model = build_loss_model(loaded.model, build_objective(config), config.train.seed)
    answer = evaluate(Stages({0: model}, Loop(model), world), build_validation(config, world))
    assert answer is not None  # nobody asked it to stop
    text = split_text(manifests, loaded.tokenizer) if "val_bits_per_byte" in answer else None
    return answer if text is None else {**answer, "xz_bits_per_byte": xz_bits_per_byte(text)}


def _fit_special_tokens(loaded: Loaded) -> None:
    """Give the objective of an imported model the ids that a run's has in its config."""
    config, size = loaded.config, fit_special_tokens(loaded.config, loaded.tokenizer)
    if size > config.model.vocab_size:
        raise ConfigError(
            f"{loaded.folder}: its model knows {config.model.vocab_size} tokens, and its tokenizer with the special "
            f"tokens of objective {config.objective.name} has {size}; use the tokenizer that it was trained with"
        )


def _check_tokenizers(manifests: Sequence[Manifest], loaded: Loaded) -> None:
    """ConfigError unless the ids in these corpora mean what they meant in training."""
    for manifest in manifests:
        found, own = manifest.tokenizer["sha256"], loaded.tokenizer
        if found != own.sha256:
            file = loaded.folder / own.file
            raise ConfigError(
                f"{manifest.root}: was prepared with tokenizer {found[:12]}..., the run was trained with "
                f"{own.sha256[:12]}...; prepare the text with tokenizer.path={file}"
            )
