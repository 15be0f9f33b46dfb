"""The recurrences as public functions: states in and out, their gradients, packed sequences."""

import inspect
import itertools
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla import mixers
from lla.mixers import chunks
from tests.measure import relative_error

README = Path(mixers.__file__).parent / "README.md"
BATCH, LENGTH, HEADS, DIM, VALUE_DIM = 2, 23, 2, 4, 3
RECURRENCES = {
    "delta_rule": mixers.delta_rule,
    "gated_delta_rule": mixers.delta_rule,
    "linear_attention": mixers.linear_recurrence,
    "ssd": mixers.linear_recurrence,
    "gla": mixers.linear_recurrence,
    "mesa": mixers.mesa,
    "selective_scan": mixers.selective_scan,
    "long_convolution": mixers.long_convolution,
}
every = pytest.mark.parametrize("name", RECURRENCES)
forms = pytest.mark.parametrize("form", ["parallel", "recurrent"])
slow_reference = pytest.mark.parametrize(
    "form", ["parallel", pytest.param("recurrent", marks=pytest.mark.slow)]
)


def arguments(name, seed=0, length=LENGTH):
    """Sequences [B, T, ...], arrays without time by keyword, and a state that is not zero."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    tokens = (BATCH, length)
    if name == "selective_scan":
        delta, rates = rng.uniform(0.1, 1, (2, BATCH, length, DIM)).astype(np.float32)
        fixed = {"a": -rates[0, :VALUE_DIM].T}
        sequences = {"x": normal(*tokens, DIM), "delta": delta}
        sequences |= {"b": normal(*tokens, VALUE_DIM), "c": normal(*tokens, VALUE_DIM)}
        return sequences, fixed, normal(BATCH, DIM, VALUE_DIM)
    if name == "long_convolution":
        filter = normal(40, DIM) * np.exp(-0.2 * np.arange(40, dtype=np.float32))[:, None]
        return {"inputs": normal(*tokens, DIM)}, {"filter": filter}, normal(BATCH, 39, DIM)
    key = normal(*tokens, HEADS, DIM)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    sequences = {"query": normal(*tokens, HEADS, DIM), "key": key}
    sequences["value"] = normal(*tokens, HEADS, VALUE_DIM)
    if name in ("delta_rule", "gated_delta_rule", "mesa"):
        sequences["beta"] = rng.uniform(0.2, 1, (*tokens, HEADS)).astype(np.float32)
    if name in ("gated_delta_rule", "ssd", "gla", "mesa"):
        shape = (*tokens, HEADS, DIM) if name == "gla" else (*tokens, HEADS)
        sequences["log_decay"] = -rng.uniform(0, 0.5, shape).astype(np.float32)
    state = normal(BATCH, HEADS, DIM, VALUE_DIM)
    if name != "mesa":
        return sequences, {}, state
    moment = normal(BATCH, HEADS, DIM, DIM)
    moment = moment @ np.swapaxes(moment, -1, -2)
    ridge = rng.uniform(0.5, 1, (HEADS, DIM)).astype(np.float32)
    return sequences, {"ridge": ridge}, mixers.MesaState(moment, state)


def options(name, form):
    chosen = {"form": form}
    if name != "long_convolution":
        chosen["chunk"] = 8
    if name == "mesa":  # so that what is compared is not the tolerance of iterations
        chosen["solver"] = "exact"
    return chosen


@partial(jax.jit, static_argnames=("run",))
def differentiate(run, sequences, fixed, state, weight):
    """Outputs and last state, and the gradients of a function of both."""

    def loss(sequences, fixed, state):
        out, last = run(sequences, fixed, state)
        total = jnp.sum(out * weight)
        return total + sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(last)), (out, last)

    (_, results), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        sequences, fixed, state
    )
    return results, gradients


def close(actual, expected, bound=1e-5):
    for found, wanted in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert relative_error(found, wanted) < bound


def part(sequences, first, last):
    return {name: array[:, first:last] for name, array in sequences.items()}


@every
@slow_reference
def test_pieces_from_a_state_equal_the_whole_with_gradients_through_the_state(name, form):
    sequences, fixed, state = arguments(name)
    function = partial(RECURRENCES[name], return_state=True, **options(name, form))

    def whole(sequences, fixed, state):
        return function(**sequences, **fixed, state=state)

    def pieces(sequences, fixed, state):
        outs = []
        for first, last in ((0, 9), (9, 10), (10, LENGTH)):
            out, state = function(**part(sequences, first, last), **fixed, state=state)
            outs.append(out)
        return jnp.concatenate(outs, axis=1), state

    out = function(**sequences, **fixed)[0]
    weight = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
    expected = differentiate(whole, sequences, fixed, state, weight)
    close(differentiate(pieces, sequences, fixed, state, weight), expected, 3e-5)
    assert relative_error(out, expected[0][0]) > 0.1  # the state matters


@every
def test_steps_equal_the_whole_with_gradients_through_the_state(name):
    sequences, fixed, state = arguments(name)
    function = RECURRENCES[name]
    step = getattr(mixers, function.__name__ + "_step")
    if name == "mesa":
        step = partial(step, solve=mixers.make_solver("exact"))

    def whole(sequences, fixed, state):
        chosen = options(name, "parallel")
        return function(**sequences, **fixed, state=state, return_state=True, **chosen)

    def steps(sequences, fixed, state):
        if name == "linear_attention":
            sequences = sequences | {"log_decay": jnp.zeros(sequences["key"].shape[:3])}
        outs = []
        for t in range(LENGTH):
            token = {name: array[:, t] for name, array in sequences.items()}
            state, out = step(state, **token, **fixed)
            outs.append(out)
        return jnp.stack(outs, axis=1), state

    shape = jax.eval_shape(whole, sequences, fixed, state)[0].shape
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    expected = differentiate(whole, sequences, fixed, state, weight)
    close(differentiate(steps, sequences, fixed, state, weight), expected, 3e-5)


IDS = np.array([[3] * 8 + [1] + [3] * 14, [0] * 13 + [5] * 10], np.int32)


@every
@forms
def test_packed_equals_apart_with_gradients_of_arrays_and_state(name, form):
    """The first segment goes on from the state, and the last state is that of the last segment."""
    sequences, fixed, state = arguments(name)
    function = partial(RECURRENCES[name], return_state=True, **options(name, form))

    def packed(sequences, fixed, state):
        return function(**sequences, **fixed, state=state, segment_ids=IDS)

    def apart(sequences, fixed, state):
        outs, lasts = [], []
        for b, ends in enumerate(((0, 8, 9, LENGTH), (0, 13, LENGTH))):
            row, out = {name: array[b : b + 1] for name, array in sequences.items()}, []
            last = jax.tree.map(lambda leaf, b=b: leaf[b : b + 1], state)
            for first, end in itertools.pairwise(ends):
                last = last if first == 0 else jax.tree.map(jnp.zeros_like, last)
                y, last = function(**part(row, first, end), **fixed, state=last)
                out.append(y)
            outs.append(jnp.concatenate(out, axis=1))
            lasts.append(last)
        join = lambda *leaves: jnp.concatenate(leaves, axis=0)  # noqa: E731
        return join(*outs), jax.tree.map(join, *lasts)

    shape = jax.eval_shape(packed, sequences, fixed, state)[0].shape
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    expected = differentiate(apart, sequences, fixed, state, weight)
    found = differentiate(packed, sequences, fixed, state, weight)
    close(found, expected, 3e-5)
    if "log_decay" in sequences:  # gates that would act on another segment have no effect at all
        gradient = np.asarray(found[1][0]["log_decay"])
        assert not gradient[0, [8, 9]].any() and not gradient[1, 13].any()


@every
@slow_reference
def test_nothing_is_left_of_huge_numbers_in_the_segment_before(name, form):
    sequences, fixed, _ = arguments(name)
    huge = {key: array.copy() for key, array in sequences.items()}
    for key in ("value", "x", "inputs"):
        if key in huge:
            huge[key][:, :10] *= 1e30
    ids = np.repeat(np.array([[0, 1]] * BATCH, np.int32), [10, LENGTH - 10], axis=1)
    function = partial(RECURRENCES[name], return_state=True, **options(name, form))
    out, state = function(**huge, **fixed, segment_ids=ids)
    expected = function(**part(sequences, 10, LENGTH), **fixed)
    close((out[:, 10:], state), expected)


@every
@slow_reference
def test_packed_in_float64(name, form, float64):
    sequences, fixed, _ = arguments(name)
    with float64():
        wide = [{k: jnp.asarray(a, jnp.float64) for k, a in d.items()} for d in (sequences, fixed)]
        chosen = options(name, form)
        out = RECURRENCES[name](**wide[0], **wide[1], segment_ids=IDS, **chosen)
        alone = RECURRENCES[name](**part(wide[0], 13, LENGTH), **wide[1], **chosen)
        assert out.dtype == jnp.float64
        out, alone = np.asarray(out), np.asarray(alone)
    assert relative_error(out[1, 13:], alone[1]) < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_logarithm_of_zero_is_one(dtype, float64):
    with float64():
        logarithm = jnp.asarray(chunks.log_of_zero(jnp.dtype(dtype)), dtype)
        assert np.asarray(jnp.exp(logarithm)) == 0 and abs(float(logarithm)) <= 1024


@every
def test_wrong_segment_ids(name):
    sequences, fixed, _ = arguments(name)
    for wrong in (IDS[:, :-1], IDS.astype(np.float32)):
        with pytest.raises(ValueError, match="segment_ids must be an integer array of shape"):
            RECURRENCES[name](**sequences, **fixed, segment_ids=wrong)


def test_docstrings_name_every_argument():
    for name in mixers.__all__:
        function = getattr(mixers, name)
        if function in RECURRENCES.values() or name.endswith("_step"):
            assert "radients" in function.__doc__ or "ifferentiable" in function.__doc__, name
            for parameter in inspect.signature(function).parameters:
                listed = rf"^      (\w+, )*{parameter}(, \w+)*:"
                assert re.search(listed, function.__doc__, re.MULTILINE), (name, parameter)


@pytest.mark.compat
def test_the_example_of_the_readme_runs():
    """Under JAX's own promotion rules, as a reader would."""
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert any("segment_ids" in code for code in blocks)
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in blocks:
            exec(compile(code, "lla/mixers/README.md", "exec"), namespace)
