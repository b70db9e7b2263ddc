"""ELECTRA (Clark et al. 2020): a small generator fills masked places, and an encoder tells which tokens it replaced.

A line of families.py. Both read one embedding, whose width is its own and from which each projects to its width. The
generator, its head included, belongs to the embedding: what replaces tokens stands before the stack that judges them,
and a tied table never has two places. What trains it (loss and sampling) is the objective's; nothing here draws.
As in the paper's code the whole embedding is shared, its norm too. Shapes: B batch, T tokens, E width of the
embedding, D width, G width of the generator, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import Tensor, nn

from shardwright.config import meaning
from shardwright.model import bert
from shardwright.model.dropout import layer_keys
from shardwright.model.encoder import Encoder, EncoderConfig, SegmentEmbed
from shardwright.model.family import (
    Beside,
    Extra,
    Family,
    HuggingFaceMap,
    TensorRule,
    class_rules,
    class_variants,
    weight_and_bias,
)
from shardwright.model.layers import ACTIVATIONS, Linear
from shardwright.model.transformer import (
    Block,
    Context,
    Embed,
    Head,
    Inputs,
    PostNormBlock,
    TransformerConfig,
    build_stack_norm,
    suit_kernel,
)


class ElectraConfig(EncoderConfig):
    """BERT's choices for both stacks; the paper's sizes, with its generators (Clark et al. 2020, table 6)."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {"layers": 12, "width": 256, "heads": 4, "embed_width": 128, "generator_width": 64},
        "base": {"layers": 12, "width": 768, "heads": 12, "generator_width": 256},
        "large": {"layers": 24, "width": 1024, "heads": 16, "generator_width": 256},
    }

    kind: ClassVar[str] = "generator and discriminator"
    class_pooler: ClassVar[Literal["tanh", "gelu"] | None] = "gelu"
    family: Literal["electra"] = meaning("electra", "Model family")
    generator_layers: int | None = meaning(
        None, "Blocks of the generator; null is as many as the stack's, 0 none", ge=0
    )
    generator_width: int | None = meaning(None, "Width of the generator; null is a quarter of the stack's", ge=1)
    generator_heads: int | None = meaning(None, "Heads of the generator; null is one for every 64 channels", ge=1)
    generator_mlp_width: int | None = meaning(None, "Feed-forward width of the generator; null is 4 x its width", ge=1)

    @model_validator(mode="after")
    def _plain_width(self) -> ElectraConfig:
        if self.embed_width == self.width:
            self.__dict__["embed_width"] = None  # nothing is projected
        return self

    @model_validator(mode="after")
    def _discriminates(self) -> ElectraConfig:
        if self.classify != "none":
            if self.generator_layers:
                raise ValueError(
                    f"generator_layers={self.generator_layers}: nothing trains a generator beside a classifier; use 0"
                )
            self.__dict__["generator_layers"] = 0
        return self

    def one_of_each(self) -> TransformerConfig:
        """The same with one block in its stack; the generator keeps its own."""
        return self.model_copy(update={"layers": 1, "generator_layers": self.generator.layers})

    @property
    def ties_stages(self) -> bool:
        """The generator's head is in the layer of its embedding; the stack's own head has no vocabulary."""
        return False

    @property
    def generator(self) -> TransformerConfig:
        """The shape of the generator's blocks."""
        width = self.generator_width or self.width // 4
        shape = {
            "layers": self.layers if self.generator_layers is None else self.generator_layers,
            "width": width,
            "heads": self.generator_heads or max(1, width // 64),
            "mlp_width": self.generator_mlp_width,
            "kv_heads": None,
            "head_dim": None,
        }
        return self.model_copy(update=shape)

    def derived(self) -> dict[str, Any]:
        """What fields that may be null come to."""
        own = self.generator
        found = {"layers": own.layers, "width": own.width, "heads": own.heads, "mlp_width": own.hidden_width}
        generator = {f"generator_{name}": value for name, value in found.items()}
        return {**super().derived(), "embed_width": self.token_width, **generator}


class GeneratorHead(Head):
    """The generator's head on the tokens: a transform back to the embedding's width, a weight, and a bias."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config)
        self.transform = GeneratorTransform(config)


class GeneratorTransform(nn.Module):
    """norm(gelu(dense(x)))."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.dense = Linear(config.generator.width, config.token_width)
        self.function = ACTIVATIONS["gelu"].function  # whatever the blocks have
        self.norm = build_stack_norm(config, config.token_width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., G] -> [..., E]."""
        return self.norm(self.function(self.dense(x)))


class Generator(nn.Module):
    """A narrow stack on the shared embedding, with a head on the tokens."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        own = config.generator
        self.projection = None if config.token_width == own.width else Linear(config.token_width, own.width)
        block = Block if own.norm_placement == "pre" else PostNormBlock
        self.blocks = nn.ModuleDict({str(n): block(own) for n in range(own.layers)})
        self.final_norm = build_stack_norm(own) if own.norm_placement == "pre" else None
        self.head = GeneratorHead(config)

    def forward(self, x: Tensor, context: Context, keys: Tensor | None) -> Tensor:
        """Embedded tokens [B, T, E] -> hidden states [B, T, G]; `keys` [layers] of its blocks' dropout."""
        x = x if self.projection is None else self.projection(x)
        for name, block in self.blocks.items():
            x = block(x, context, None if keys is None else keys[int(name)], None)
        return x if self.final_norm is None else self.final_norm(x)


class ElectraEmbed(SegmentEmbed):
    """The embedding that both stacks read, the projection to the width of the larger one, and the generator."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config)
        self.generator = Generator(config) if config.generator.layers else None

    def vectors(self, input_ids: Tensor, context: Context, layer_key: Tensor | None = None) -> Tensor:
        """ids [B, T] -> [B, T, E], what both stacks read."""
        return Embed.forward(self, input_ids, context, layer_key)


class ReplacedHead(nn.Module):
    """classifier(act(dense(x))): whether a token is another than the text's."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.function = ACTIVATIONS[config.activation].function
        self.classifier = Linear(config.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> logits [...]; greater than 0 is replaced."""
        return self.classifier(self.function(self.dense(x))).squeeze(-1)


class ElectraHead(nn.Module):
    """The stack's only head."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.replaced = ReplacedHead(config)


class Electra(Encoder):
    """The encoder that is kept, with the generator that trains it inside its embedding."""

    config: ElectraConfig
    embed: ElectraEmbed | None

    def build_embed(self, config: Any) -> Embed:
        """The shared embedding and the generator."""
        return ElectraEmbed(config)

    def build_head(self, config: Any) -> Any:
        """On every token, whether it was replaced."""
        return ElectraHead(config)

    def other_heads(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """`replaced`: [..., D] -> [...]."""
        found = getattr(self.head, "replaced", None)
        return super().other_heads() if found is None else {"replaced": found}

    @property
    def generator(self) -> Generator:
        """What drafts; in the layer of the embedding."""
        found = None if self.embed is None else self.embed.generator
        assert found is not None, "no generator here: it is where the embedding is, unless generator_layers=0"
        return found

    def draft(self, inputs: Inputs) -> Tensor:
        """The generator's hidden states [B, T, G], from inputs with masked tokens."""
        generator, context = self.generator, self.context(inputs)
        keys = self._draft_keys(context)
        assert self.embed is not None
        x = self.embed.vectors(inputs.input_ids, context, None if keys is None else keys[0])
        context = context._replace(mask=suit_kernel(context.mask, x), layer_keys=None)
        return generator(x, context, None if keys is None else keys[1:])

    def _draft_keys(self, context: Context) -> Tensor | None:
        """[1 + layers] keys of dropout, numbered after those of the stack, so that nothing is dropped alike in both."""
        if context.layer_keys is None:
            return None
        own = 1 + self.config.layers
        return layer_keys(own + self.config.generator.layers, context.layer_keys.device)[own:]

    @property
    def head_weight(self) -> Tensor:
        """[V, E] of the generator's head, the token embedding's where tied."""
        own = self.generator.head.weight
        assert self.embed is not None
        return self.embed.tokens.weight if own is None else own

    @property
    def head_bias(self) -> Tensor | None:
        """[V] of the generator's head, or None."""
        return self.generator.head.bias

    @property
    def transform(self) -> Callable[[Tensor], Tensor] | None:
        """[..., G] -> [..., E] before the product with the generator's head."""
        return self.generator.head.transform

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`logits` [B, T] that a token was replaced, as Hugging Face's ElectraForPreTraining gives them.

        Of a classifier as every encoder's.
        """
        inputs = Inputs(input_ids, position_ids, documents, attention_mask, token_types=token_type_ids)
        assert self.head is not None, "a part without the head has no logits"
        hidden = self.hidden(inputs)
        return self.answer(hidden, inputs) if self.config.classify != "none" else {"logits": self.head.replaced(hidden)}

    def draft_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """[B, T, V] of the generator, as Hugging Face's ElectraForMaskedLM gives them."""
        inputs = Inputs(input_ids, position_ids, documents, attention_mask, token_types=token_type_ids)
        return self.logits(self.draft(inputs))


def extra_cost(config: ElectraConfig, length: int, rows: int, predicted: float) -> Extra:
    """What the layer of the embedding costs: projections, the generator's stack, its head on the predicted share."""
    own, table = config.generator, config.token_width
    projections = table * config.width * (config.embed_width is not None)
    if not own.layers:
        return Extra(embed=2.0 * length * projections)
    matrices = own.width * (4 * own.heads * own.head_width + (3 if own.gated else 2) * own.hidden_width)
    stack = own.layers * (matrices + 2 * own.heads * own.head_width * length)
    projections += table * own.width * (table != own.width)
    head = table * (own.width + config.vocab_size)
    return Extra(embed=2.0 * length * (projections + stack + predicted * head))


#: What both of their models have in common.
SHARED_FIELDS = {
    **bert.FIELDS,
    "max_length": ("max_position_embeddings",),
    "embed_width": ("embedding_size",),
    "tied": ("tie_word_embeddings",),
}
GENERATOR_FIELDS = {
    "generator_layers": ("num_hidden_layers",),
    "generator_width": ("hidden_size",),
    "generator_heads": ("num_attention_heads",),
    "generator_mlp_width": ("intermediate_size",),
}
STACK_KEYS = {key for keys in GENERATOR_FIELDS.values() for key in keys}
DEFAULTS = {
    **bert.DEFAULTS,
    "embedding_size": 128,
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
OURS = {**{field: value for field, value in bert.OURS.items() if field != "embed_width"}, "position_offset": 0}
THEIRS = {"is_decoder": False, "add_cross_attention": False}
TABLE_RULES = tuple(
    TensorRule(rule.theirs, rule.ours) for rule in bert.stack_rules("electra.") if ".embeddings." in rule.theirs
)


def block_rules(ours: str) -> tuple[TensorRule, ...]:
    """BERT's blocks where ours are under `ours` ("embed.generator.")."""
    rules = (rule for rule in bert.stack_rules("electra.") if ".layer.{n}." in rule.theirs)
    return tuple(TensorRule(rule.theirs, tuple(f"{ours}{name}" for name in rule.ours)) for rule in rules)


GENERATOR = HuggingFaceMap(
    architecture="ElectraForMaskedLM",
    model_type="electra",
    fields={**{f: k for f, k in SHARED_FIELDS.items() if not STACK_KEYS.intersection(k)}, **GENERATOR_FIELDS},
    values=bert.ACTIVATION,
    ours=OURS,
    theirs=THEIRS,
    defaults=DEFAULTS,
    tensors=(
        *TABLE_RULES,
        *weight_and_bias("electra.embeddings_project", "embed.generator.projection"),
        *block_rules("embed.generator."),
        *weight_and_bias("generator_predictions.dense", "embed.generator.head.transform.dense"),
        *weight_and_bias("generator_predictions.LayerNorm", "embed.generator.head.transform.norm"),
        *weight_and_bias("generator_lm_head", "embed.generator.head"),
    ),
    tied=("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
    ignored=(".position_ids", ".token_type_ids"),
)
HUGGINGFACE = HuggingFaceMap(
    architecture="ElectraForPreTraining",
    model_type="electra",
    variants={"ElectraForPreTraining": {"classify": "none"}, **class_variants("Electra")},
    fields=SHARED_FIELDS,
    values=bert.ACTIVATION,
    ours={**OURS, "sentence_head": False},
    theirs=THEIRS,
    defaults=DEFAULTS,
    tensors=(
        *TABLE_RULES,
        *weight_and_bias("electra.embeddings_project", "embed.projection"),
        *block_rules(""),
        *weight_and_bias("discriminator_predictions.dense", "head.replaced.dense"),
        *weight_and_bias("discriminator_predictions.dense_prediction", "head.replaced.classifier"),
        *class_rules("classifier.out_proj", "classifier", "classifier.dense"),
    ),
    prefix="electra.",
    ignored=(".position_ids", ".token_type_ids"),
    beside={"generator": Beside(GENERATOR, absent={"generator_layers": 0}, method="draft_logits")},
)

FAMILY = Family(ElectraConfig, Electra, HUGGINGFACE, extra=extra_cost)
