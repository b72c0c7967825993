"""A model that compiles in a second, for tests of the step around it."""

import flax.linen as nn
import jax.numpy as jnp


class Detector(nn.Module):
    """The smallest model with the outputs of the detector, for strides of 16 and 32 pixels."""

    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, pixels, input_ids, attention_mask, train=False):
        x = nn.relu(nn.Conv(16, (8, 8), (8, 8), name="stem", dtype=self.dtype)(pixels.astype(self.dtype)))
        levels = [nn.Conv(32, (size, size), (size, size), name=f"level_{size}", dtype=self.dtype)(x) for size in (2, 4)]
        x = nn.tanh(jnp.concatenate([y.reshape(len(y), -1, 32) for y in levels], axis=1))  # [B, N, C]
        words = nn.Embed(64, 32, name="words", dtype=self.dtype)(input_ids)
        return {
            "token_logits": jnp.einsum("bnc,blc->bnl", x, words),
            "box_deltas": nn.Dense(4, name="box", dtype=self.dtype)(x),
            "centerness": nn.Dense(1, name="centerness", dtype=self.dtype)(x)[..., 0],
        }
