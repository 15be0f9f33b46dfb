"""Generation: what the parallel form would choose, draws by a key, ends, and ragged prompts."""

import dataclasses
import doctest
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lla
from lla import mixers
from lla.models import ModelConfig, SequenceModel

ROOT = pathlib.Path(__file__).parents[2]
VOCAB, LENGTH = 11, 16
CONFIG = ModelConfig(
    width=16,
    depth=1,
    num_heads=2,
    mixer="gla",
    mixer_options={},
    vocab_size=VOCAB,
    input_dim=None,
    output_dim=VOCAB,
    max_length=LENGTH,
)


def names(*quick):
    """All mixers, those that are not `quick` in the slow tests."""
    slow = [name for name in mixers.names() if name not in quick]
    return pytest.mark.parametrize(
        "name", [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]
    )


PROMPT = jnp.array([[1, 7, 3, 4], [9, 5, 2, 10]], jnp.int32)
RAGGED = jnp.array([4, 2], jnp.int32)


def build(name="gla", seed=0, **changes):
    config = dataclasses.replace(CONFIG, mixer=name, mixer_options=mixers.options(name))
    return SequenceModel(dataclasses.replace(config, **changes), rngs=nnx.Rngs(seed))


@nnx.jit
def logits_of(model, tokens):
    return model(tokens)


@nnx.jit
def decode(model, inputs, state, new_lengths=None):
    return model.decode(inputs, state, new_lengths)


def greedy(model, prompt, count):
    """The most likely token after the whole sequence, again and again; one sequence.

    Zeros fill the sequence, since one length compiles once and outputs do not see what follows.
    """
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(logits_of(model, padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@names("lla", "gla", "hyena")
def test_greedy_is_the_argmax_of_the_parallel_form_again_and_again(name):
    model = build(name)
    found = lla.generate(model, PROMPT, max_new_tokens=6, prompt_lengths=RAGGED)
    assert found.tokens.shape == (2, 6) and found.tokens.dtype == jnp.int32
    assert found.lengths.tolist() == [6, 6]
    for row, length in enumerate(RAGGED.tolist()):
        prompt = PROMPT[row, :length].tolist()
        assert found.tokens[row].tolist() == greedy(model, prompt, 6)


@names("gla")
def test_the_model_decodes_what_it_computes_in_parallel(name):
    model = build(name, depth=2, mlp_ratio=2.0, positions="learned", tie_embeddings=True)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, VOCAB)
    expected = logits_of(model, tokens)
    out, state = decode(model, tokens[:, :5], model.init_state(2, LENGTH))
    outs = [out]
    for position in range(5, 9):
        out, state = decode(model, tokens[:, position : position + 1], state)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, atol=2e-4)
    assert state.lengths.tolist() == [9, 9]

    # The second sequence starts with fewer tokens, and its padding has the last position.
    counts = jnp.array([5, 2], jnp.int32)
    out, state = decode(model, tokens[:, :5], model.init_state(2, LENGTH), counts)
    np.testing.assert_allclose(out[1, :2], expected[1, :2], atol=2e-4)
    out, state = decode(model, jnp.stack([tokens[0, 5:8], tokens[1, 2:5]]), state)
    np.testing.assert_allclose(out[0], expected[0, 5:8], atol=2e-4)
    np.testing.assert_allclose(out[1], expected[1, 2:5], atol=2e-4)
    assert state.lengths.tolist() == [8, 5]


def test_numbers_are_decoded_too():
    model = build(vocab_size=None, input_dim=5, output_dim=3)
    inputs = jax.random.normal(jax.random.key(0), (2, 6, 5))
    first, state = decode(model, inputs[:, :4], model.init_state(2, 6))
    second, _ = decode(model, inputs[:, 4:], state)
    both = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(both, logits_of(model, inputs), atol=2e-4)


def test_draws_follow_the_key_and_top_1_is_greedy():
    model = build()
    options = dict(max_new_tokens=6, temperature=1.5)
    keys = [jax.random.key(seed) for seed in (0, 0, 1)]
    first, again, other = (lla.generate(model, PROMPT, key=key, **options) for key in keys)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    most_likely = lla.generate(model, PROMPT, max_new_tokens=6)
    assert (first.tokens != most_likely.tokens).any()
    for choice in (dict(top_k=1), dict(top_p=1e-6)):
        found = lla.generate(model, PROMPT, key=keys[0], **options, **choice)
        np.testing.assert_array_equal(found.tokens, most_likely.tokens)


def test_draws_have_the_law_of_the_options():
    """Of 2000 equal prompts, the shares of the first token to 4 standard deviations."""
    count = 2000
    model = build()
    prompts = jnp.broadcast_to(PROMPT[:1], (count, 4))
    logits = np.asarray(logits_of(model, PROMPT)[0, -1], np.float64)

    def shares(temperature=1.0, **options):
        found = lla.generate(
            model, prompts, max_new_tokens=1, temperature=temperature, key=jax.random.key(2),
            **options,
        )  # fmt: skip
        return np.bincount(np.asarray(found.tokens[:, 0]), minlength=VOCAB) / count

    def law(temperature=1.0, kept=VOCAB):
        weight = np.exp(logits / temperature)
        weight[np.argsort(-logits)[kept:]] = 0.0
        return weight / weight.sum()

    def near(found, expected):
        assert ((found == 0) | (expected > 0)).all()
        deviation = np.sqrt(expected * (1 - expected) / count)
        assert (np.abs(found - expected) <= 4 * deviation).all()

    near(shares(), law())
    near(shares(temperature=0.5), law(0.5))
    near(shares(temperature=0.5, top_k=3), law(0.5, kept=3))
    ordered = np.sort(law())[::-1]
    reach = float(ordered[:4].sum() + 0.5 * ordered[4])  # needs the fifth
    near(shares(top_p=reach), law(kept=5))
    assert np.abs(shares(temperature=0.5) - law()).max() > 0.05  # the bound can be missed


def test_an_end_token_ends_its_sequence():
    model = build()
    free = np.asarray(lla.generate(model, PROMPT, max_new_tokens=8).tokens)
    end = int(free[0, 2])
    first = [int(np.argmax(row == end)) if end in row else 7 for row in free]
    found = lla.generate(model, PROMPT, max_new_tokens=8, eos_id=end, pad_id=99)
    assert found.lengths.tolist() == [at + 1 for at in first]
    for row in range(2):
        np.testing.assert_array_equal(
            found.tokens[row, : first[row] + 1], free[row, : first[row] + 1]
        )
        np.testing.assert_array_equal(found.tokens[row, first[row] + 1 :], 99)


class Repeater(nnx.Module):
    """The next token is the one read plus 1; `calls` tells how often it was asked."""

    def __init__(self):
        self.calls = nnx.static(Calls())

    def init_state(self, batch, max_length):
        return jnp.zeros((batch,), jnp.int32)

    def decode(self, inputs, state, new_lengths=None):
        jax.debug.callback(self.calls.append, jnp.int32(0))
        return 9.0 * jax.nn.one_hot(inputs + 1, VOCAB), state + inputs.shape[1]


class Calls(list):
    __hash__ = object.__hash__  # a static part of a module needs one


def test_the_loop_stops_when_every_sequence_has_ended():
    model = Repeater()
    found = lla.generate(model, jnp.array([[5], [3]]), max_new_tokens=1000, eos_id=7, pad_id=1)
    jax.effects_barrier()
    assert found.lengths.tolist() == [2, 4]
    assert found.tokens[:, :5].tolist() == [[6, 7, 1, 1, 1], [4, 5, 6, 7, 1]]
    assert (found.tokens[:, 5:] == 1).all()
    assert len(model.calls) == 4  # the prompt and three tokens: the end token is not read


def test_it_can_be_part_of_a_compiled_function():
    model = build()

    @nnx.jit
    def run(model, prompt, lengths):
        return lla.generate(model, prompt, max_new_tokens=3, prompt_lengths=lengths)

    expected = lla.generate(model, PROMPT, max_new_tokens=3, prompt_lengths=RAGGED)
    np.testing.assert_array_equal(run(model, PROMPT, RAGGED).tokens, expected.tokens)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompt=PROMPT[0]), r"prompt must be integers of shape \[B, P\].* int32 \(4,\)"),
        (dict(prompt=jnp.ones((2, 3))), r"prompt must be integers .* float32 \(2, 3\)"),
        (dict(prompt=PROMPT[:, :0]), r"not empty, got int32 \(2, 0\)"),
        (dict(prompt=PROMPT.at[1, 2].set(50)), r"tokens in 0 ... 10, .* got 50 at \[1, 2\]"),
        (dict(prompt=PROMPT.at[0, 0].set(-1)), r"\(2, 4\) must hold .* got -1 at \[0, 0\]"),
        (dict(prompt=np.array([[1, 2**32 + 1]])), r"got 4294967297 at \[0, 1\]"),
        (dict(eos_id=11), "eos_id must lie in 0 ... 10, the vocabulary, got 11"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(max_new_tokens=14), r"prompt \(2, 4\) and max_new_tokens \(14\) .* 17 .* most 16"),
        (dict(prompt_lengths=jnp.array([1, 2, 3])), r"shape \[B\] = \(2,\), got int32 \(3,\)"),
        (dict(prompt_lengths=jnp.array([1, 5])), r"must lie in 1 ... 4, .* got \[1 5\]"),
        (dict(prompt_lengths=jnp.array([0, 4])), r"must lie in 1 ... 4"),
        (dict(temperature=-1.0), "temperature must be finite and >= 0"),
        (dict(temperature=1.0), "key is required"),
        (dict(top_k=2), "need a temperature above 0"),
        (dict(top_p=0.5, key=jax.random.key(0)), "need a temperature above 0"),
        (dict(temperature=1.0, key=jax.random.key(0), top_k=0), "top_k must be at least 1"),
        (dict(temperature=1.0, key=jax.random.key(0), top_p=0.0), r"top_p must be in \(0, 1\]"),
    ],
)
def test_mistakes_are_named(changes, message):
    arguments = dict(prompt=PROMPT, max_new_tokens=2) | changes
    with pytest.raises(ValueError, match=message):
        lla.generate(build(positions="learned"), **arguments)


def test_padding_of_the_prompt_may_be_any_number():
    model, padded = build(), PROMPT.at[1, 2:].set(-100)
    options = dict(max_new_tokens=2, prompt_lengths=RAGGED)
    found, expected = (lla.generate(model, prompt, **options) for prompt in (padded, PROMPT))
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_states_that_learned_positions_cannot_serve_are_errors():
    model = build(positions="learned")
    with pytest.raises(ValueError, match=r"max_length \(17\) exceeds the 16 learned positions"):
        model.init_state(2, 17)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        model.init_state(2, 0)
    _, state = decode(model, jnp.ones((2, 15), jnp.int32), model.init_state(2, LENGTH))
    with pytest.raises(ValueError, match="max_length is 16"):
        model.decode(jnp.ones((2, 2), jnp.int32), state)
    out, _ = decode(model, jnp.ones((2, 2), jnp.int32), state, jnp.array([2, 1], jnp.int32))
    assert np.isnan(out[0]).all() and np.isfinite(out[1, 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["lla.generate", "lla.mixers.protocol", "lla.ops.decode"])
def test_examples_in_docstrings(module):
    __import__(module)
    failed, attempted = doctest.testmod(sys.modules[module])
    assert attempted > 0 and failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mqar", "state_tracking"])
def test_the_example_answers_questions_as_the_parallel_form_does(task, tmp_path):
    def run(script, *arguments):
        command = [sys.executable, f"experiments/{script}.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    path = f"--workdir={tmp_path / 'run'}"
    early = run("generate", path)
    assert early.returncode == 1 and "Traceback" not in early.stderr
    trained = run("train", f"--config=configs/{task}.py:smoke", path)
    assert trained.returncode == 0, trained.stderr
    answered = run("generate", path, "--examples=3")
    assert answered.returncode == 0, answered.stderr
    count = {"mqar": 6, "state_tracking": 3}[task]
    assert answered.stdout.count("->") == count and answered.stdout.count("prompt") == 3
    assert f"of {count} answers are right" in answered.stdout
    assert f"parallel form: {count} answers equal" in answered.stdout
