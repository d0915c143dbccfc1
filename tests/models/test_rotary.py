"""Rotary frequencies equal the published formulas written in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from adalomo_jax.models import RopeScaling
from adalomo_jax.models.rotary import rotary_angles, rotary_frequencies

LLAMA_3_1 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
LLAMA_3_2 = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


def reference(head_dim, theta, scaling):
    """Run Llama 3.1's own code, frequency by frequency."""
    scaled = []
    for frequency in theta ** -(np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < scaling.original_max_position_embeddings / scaling.high_freq_factor:
            scaled.append(frequency)
        elif wavelength > scaling.original_max_position_embeddings / scaling.low_freq_factor:
            scaled.append(frequency / scaling.factor)
        else:
            smooth = scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return np.array(scaled)


@pytest.mark.parametrize("scaling", [LLAMA_3_1, LLAMA_3_2])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama_3s_scaling(scaling, head_dim):
    actual, expected = rotary_frequencies(head_dim, 5e5, scaling), reference(head_dim, 5e5, scaling)
    np.testing.assert_allclose(actual, expected, rtol=2e-6)
    plain = rotary_frequencies(head_dim, 5e5)
    assert actual[0] == plain[0] and np.isclose(actual[-1] * scaling.factor, plain[-1])
    assert np.any((actual < plain * 0.99) & (actual > plain / scaling.factor * 1.01))


def test_linear_scaling_stretches_all_positions():
    stretched = rotary_angles(32, 16, 1e4, RopeScaling("linear", 4.0))
    plain = rotary_angles(8, 16, 1e4)
    np.testing.assert_allclose(jnp.stack(stretched)[:, ::4], jnp.stack(plain), rtol=1e-6, atol=1e-6)
