"""What `--list`, `--describe` and `--dry_run` print."""

import importlib
import re

import jax
import pytest

from lla import docstrings, mixers, tasks, training
from lla.runs.command import configs
from lla.training import describe

CASES = [
    (name, variant)
    for name in configs()
    for variant in importlib.import_module(f"lla.configs.{name}").VARIANTS
]


@pytest.mark.parametrize("name, variant", CASES, ids=lambda part: part)
def test_every_field_of_every_config_has_its_value_and_a_meaning(name, variant):
    config = importlib.import_module(f"lla.configs.{name}").get_config(variant)
    if describe.is_training(config):
        found = describe.fields(config)
    else:
        found = describe.study_fields(config, configs()[name])
    assert [field.path for field in found if not field.meaning] == []
    named = {field.path: field.value for field in found}
    assert len(named) == len(found) == len(set(named))

    def check(path, section):
        for key, value in section.items():
            inner = f"{path}.{key}"
            if inner in named:
                assert describe.plain(value) == named[inner], inner
            elif not inner.startswith("config.mixers."):  # of mixers that are not trained
                check(inner, value)

    check("config", config)


@pytest.mark.parametrize("name", mixers.names())
def test_every_option_of_a_mixer_is_documented(name):
    meanings = mixers.registry.meanings(name)
    assert list(meanings) == list(mixers.options(name))
    assert all(meanings.values()), meanings
    # References are followed.
    assert not [text for text in meanings.values() if text.startswith("as in `")]


def test_the_catalogue_names_everything():
    text = "\n".join(describe.catalogue(configs()))
    for name, variant in CASES:
        assert f"\n  {name}  (lla-" in f"\n{text}" and (not variant or f"  :{variant}  " in text)
    for name in (*tasks.names(), *mixers.names()):
        assert re.search(rf"^  {name}  \w", text, re.MULTILINE), name


def test_fields_as_text():
    config = importlib.import_module("lla.configs.mqar").get_config("smoke")
    text = "\n".join(describe.lines(describe.fields(config)))
    assert "config.training.steps = 8\n    updates." in text
    assert "config.task.length = 16\n    N, tokens per sequence; even." in text
    assert "config.mixers.lla.ridge = 1.0\n    the ridge, or its initial value" in text
    assert "config.mixers.gla" not in text
    config.model.mixer.name = "gla"
    assert "config.mixers.gla.expand_k = 0.5" in "\n".join(describe.lines(describe.fields(config)))


def test_a_dry_run_tells_parameters_memory_and_steps():
    config = importlib.import_module("lla.configs.mqar").get_config("smoke").to_dict()
    config["model"]["mixer"]["name"] = "linear"
    config["sharding"]["data"] = 1
    trainer = training.Trainer(training.resolve(config))
    text = "\n".join(describe.dry_run(trainer))
    count = sum(leaf.size for leaf in jax.tree.leaves(trainer.init().params))
    assert re.search(rf"^parameters +{count:,}$", text, re.MULTILINE)
    assert '"vocab_size": 32' in text and re.search(r"^steps +8 of 8 sequences", text, re.MULTILINE)
    state = 4 * (3 * count + 4)  # parameters, two moments, and four counters
    assert f"state        {state / 1024:.3g} KiB" in text
    (memory,) = re.findall(r"^memory +([\d.]+) KiB .* of which ([\d.]+) KiB", text, re.MULTILINE)
    assert float(memory[0]) > float(memory[1]) > 0
    assert re.search(r"^evaluations +3 of 2 batches$", text, re.MULTILINE)  # at 0, 4 and 8


def test_a_dry_run_of_a_sweep_counts_runs_and_updates():
    config = importlib.import_module("lla.configs.mqar").get_config("smoke").to_dict()
    *points, phase, total = describe.dry_run_of_sweep(config)
    assert len(points) == 2 and all("4 runs of at most 8 steps" in line for line in points)
    assert phase == "phase final: seeds 0, 1; learning rates 0.001, 0.003"
    assert total == "2 points, 8 runs, at most 64 updates"


def test_meanings_come_from_the_docstrings():
    class Base:
        """A base.

        Attributes:
          first: of the base.
          second, third: both
            of them: twice.
        """

    class Derived(Base):
        """Another.

        Args:
          first: as in `lla.mixers.linear.LinearAttention`.
          form: as in `lla.mixers.linear.LinearAttention`.
          width: as in `lla.mixers.linear.LinearAttention`.
        """

    found = docstrings.meanings(Derived)
    assert found["second"] == found["third"] == "both of them: twice."
    assert found["width"] == "of the tokens."
    assert found["form"].startswith('``"parallel"``')  # two references on
    assert found["first"].startswith("as in `lla.")  # which has nothing of this name


def test_comments_document_the_fields_of_a_file(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "# A heading.\n\nconfig.a = 1  # beside\n# above\n# it\nconfig.b = (\n    2,  # inside\n)\n"
        "config.c = 3\nconfig.a = 4  # later\n"
    )
    assert docstrings.commented(file) == {"a": "beside", "b": "above it"}
