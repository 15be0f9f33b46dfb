"""The kernels for all NVIDIA GPUs: what they refuse, and that they lower for a card by its name."""

import jax
import jax.numpy as jnp
import pytest

import lla
from lla.compat import lowering_for, target_capability

HAS_KERNELS = jax.__version_info__ >= (0, 11, 2)
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the kernels need JAX 0.11.2")
CARDS = ["9.0", "10.0", "12.0"] + (["8.0", "8.9"] if jax.__version_info__ >= (0, 12) else [])


def arrays(head_dim=64, length=200):
    query = jax.ShapeDtypeStruct((2, length, 4, head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, length, 2, head_dim), jnp.bfloat16)
    return query, key, key


def lower(capability, implementation="mosaic_gpu_portable", **options):
    """The text of the lowered gradients."""

    def loss(query, key, value):
        out = lla.local_linear_attention(
            query, key, value, ridge=1.0, implementation=implementation, **options
        )
        return out.astype(jnp.float32).sum()

    with lowering_for("cuda", capability=capability):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays())
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.compat
@needs_kernels
@pytest.mark.parametrize("capability", CARDS)
def test_lowers_for_a_card(capability):
    text = lower(capability)
    assert text.count("mosaic_gpu") >= 5
    assert target_capability() is None


@needs_kernels
def test_hopper_kernels_lower_for_hopper():
    assert lower("9.0", "mosaic_gpu").count("mosaic_gpu") >= 5
    with lowering_for("cuda", capability="9.0"):
        assert not [name for name in lla.explain(*arrays()) if name.startswith("mosaic_gpu:")]


@pytest.mark.parametrize(
    ("capability", "reason"),
    [("7.5", r"8\.0 \(Ampere\)"), ("8.0", r"0\.12"), ("13.7", r"13\.7"), ("9.0", r"0\.11\.2")],
)
def test_says_why_not(capability, reason):
    if (capability == "8.0" and jax.__version_info__ >= (0, 12)) or (
        capability == "9.0" and HAS_KERNELS
    ):
        reason = None
    if not HAS_KERNELS and capability == "13.7":
        reason = r"0\.11\.2"
    with lowering_for("cuda", capability=capability):
        found = lla.explain(*arrays())["mosaic_gpu_portable"]
    if reason is None:
        assert found is None
    else:
        with pytest.raises(NotImplementedError, match=reason):
            raise NotImplementedError(found)


def test_needs_an_nvidia_gpu():
    found = lla.explain(*arrays())["mosaic_gpu_portable"]
    assert "NVIDIA" in found and jax.devices()[0].platform in found


@needs_kernels
def test_the_card_decides_which_kernels_serve(monkeypatch):
    """The portable ones where those for Hopper do not; unless by name, where they were checked."""
    from lla.ops.mosaic_gpu import portable

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lower("10.0", "mosaic_gpu").count("mosaic_gpu") >= 5
    assert "mosaic_gpu" not in lower("10.0", None)
    with lowering_for("cuda", capability="10.0"):
        found = lla.explain(*arrays())
    assert found["mosaic_gpu"] is None is found["mosaic_gpu_portable"]
    assert "target is 10.0" in found["mosaic_gpu:hopper"]
    assert "never been checked on compute capability 10.0" in found["mosaic_gpu:default"]

    monkeypatch.setitem(portable.MEASURED, (10, 0), 64)
    assert lower("10.0", None).count("mosaic_gpu") >= 5
    with lowering_for("cuda", capability="10.0"):
        assert "mosaic_gpu:default" not in lla.explain(*arrays())
        assert "head dimension 128" in lla.explain(*arrays(128))["mosaic_gpu:default"]


@needs_kernels
def test_wide_heads_on_hopper():
    """The portable kernels serve head dimensions that those for Hopper do not."""
    with lowering_for("cuda", capability="9.0"):
        found = lla.explain(*arrays(160))
    assert found["mosaic_gpu"] is None and "160" in found["mosaic_gpu:hopper"]


@needs_kernels
def test_shared_memory_is_a_reason():
    query = jax.ShapeDtypeStruct((2, 200, 4, 256), jnp.bfloat16)
    with lowering_for("cuda", capability="9.0"):
        assert lla.explain(query, query, query)["mosaic_gpu_portable"] is None
    with lowering_for("cuda", capability="12.0"):
        assert "shared memory" in lla.explain(query, query, query)["mosaic_gpu_portable"]


@pytest.mark.parametrize(
    ("platform", "options"),
    [("rocm", {}), ("cuda", {}), ("cuda", {"capability": "9"}), ("tpu", {"capability": "9.0"})],
)
def test_wrong_targets(platform, options):
    with pytest.raises(ValueError, match=r"capability|platform"), lowering_for(platform, **options):
        pass


@pytest.mark.compat
@needs_kernels
def test_configurations_fit():
    from lla.kernels.mosaic_gpu_mma import configs
    from lla.kernels.mosaic_gpu_mma.launch import SHARED_MEMORY

    for capability, memory in SHARED_MEMORY.items():
        for head_dim in configs.HEAD_DIMS:
            if not configs.fits(head_dim, capability):
                assert head_dim == 256
                continue
            chosen = configs.choose(head_dim, capability)
            for name, needs in configs.NEEDS.items():
                config = getattr(chosen, name)
                sizes = head_dim, config.block, config.stages, config.resident_operand
                assert needs.shared(*sizes) <= memory
                assert config.capability == capability and config.stages >= 2
