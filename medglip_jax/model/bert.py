"""BERT (arXiv 1810.04805): the text encoder, and the layer of it that stands in each block of the tower."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from ml_collections import ConfigDict

from medglip_jax.model.blocks import Block, run_blocks
from medglip_jax.model.layers import Dense, gelu, layer_norm, torch_bias_init, torch_kernel_init
from medglip_jax.model.remat import NONE
from medglip_jax.ops.widening import spread, take_rows
from medglip_jax.parallel.activations import TEXT, constrain

Array = jax.Array

_EPSILON = 1e-12
_LIMIT = 50000.0  # GLIP clamps the tower's text layers to stay finite in half precision
_init = nn.initializers.normal(0.02)


class BertLayer(nn.Module):
    """Self-attention and an MLP, each followed by a norm of the sum with its input.

    Attributes:
        config: `config.model.bert`.
        in_tower: PyTorch's default initialisation and clamped activations, as in GLIP's tower.
    """

    config: ConfigDict
    dtype: jnp.dtype
    in_tower: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array, train: bool) -> Array:  # [B, L, D], bool[B, L] -> [B, L, D]
        config = self.config
        dropout = nn.Dropout(config.dropout, deterministic=not train)
        head_size = config.hidden_size // config.num_heads

        def dense(name: str, features: int, fan_in: int) -> Dense:
            kernel_init = torch_kernel_init if self.in_tower else _init
            bias_init = torch_bias_init(fan_in) if self.in_tower else nn.initializers.zeros
            return Dense(features, kernel_init=kernel_init, bias_init=bias_init, dtype=self.dtype, name=name)

        def clamp(y: Array) -> Array:
            return jnp.clip(y, -_LIMIT, _LIMIT) if self.in_tower else y

        def heads(name: str) -> Array:
            y = dense(name, config.hidden_size, config.hidden_size)(x).reshape(*x.shape[:2], -1, head_size)
            return constrain(y, "batch", "tokens", "heads", None)

        logits = jnp.einsum("bqhd,bkhd->bhqk", heads("query"), heads("key")) * head_size**-0.5
        logits = clamp(logits.astype(jnp.promote_types(self.dtype, jnp.float32)))
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(logits.dtype).min)
        weights = dropout(nn.softmax(logits).astype(self.dtype))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, heads("value")).reshape(x.shape)
        y = dropout(dense("attention_output", config.hidden_size, config.hidden_size)(y))
        x = constrain(layer_norm("attention_norm", _EPSILON, self.dtype)(x + y), *TEXT)

        y = dense("intermediate", config.intermediate_size, config.hidden_size)(x)
        y = clamp(gelu(clamp(constrain(y, "batch", "tokens", "hidden"))))
        y = clamp(dropout(dense("output", config.hidden_size, config.intermediate_size)(y)))
        return clamp(constrain(layer_norm("output_norm", _EPSILON, self.dtype)(x + y), *TEXT))


class Table(nn.Embed):
    """`nn.Embed` that brings the whole table to a device before it reads rows.

    Where the table is split by columns, XLA would bring the whole batch of rows to every device instead.
    """

    def __call__(self, inputs: Array) -> Array:
        return take_rows(constrain(self.embedding.astype(self.dtype), None, None), inputs)


class Bert(nn.Module):
    """The text encoder: hidden states of the last layer, padding included.

    Attributes:
        config: `config.model.bert`.
        remat: policy of each layer by its name (see `Block`); those that are not named have none.
        scan: run the layers as a loop.
    """

    config: ConfigDict
    dtype: jnp.dtype
    remat: Mapping[str, str] = FrozenDict()
    scan: bool = False

    @nn.compact
    def __call__(self, input_ids: Array, mask: Array, train: bool) -> Array:  # int32[B, L], bool[B, L] -> [B, L, D]
        config = self.config
        if input_ids.shape[1] > config.max_positions:
            raise ValueError(
                f"prompt of {input_ids.shape[1]} tokens, but config.model.bert.max_positions is {config.max_positions}"
            )

        def table(name: str, rows: int) -> Table:
            return Table(rows, config.hidden_size, embedding_init=_init, dtype=self.dtype, name=name)

        x = table("word_embeddings", config.vocab_size)(input_ids)
        x += spread(table("position_embeddings", config.max_positions)(jnp.arange(input_ids.shape[1])), x.shape)
        x += spread(table("token_type_embeddings", 2)(jnp.zeros((), jnp.int32)), x.shape)
        x = constrain(layer_norm("embeddings_norm", _EPSILON, self.dtype)(x), *TEXT)
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
        fields = {"config": config, "dtype": self.dtype}
        names = [f"layer_{i}" for i in range(config.num_layers)]
        layers = [Block(name, BertLayer, fields, train=3, policy=self.remat.get(name, NONE)) for name in names]
        return run_blocks(self, layers, lambda layer, x, _: layer(x, mask, train), x, scan=self.scan, train=train)
