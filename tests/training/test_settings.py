"""From a config to settings, and what is refused on the way."""

import dataclasses

import pytest

from lla import mixers, tasks, training
from lla.experiment import to_config
from lla.training import sweep
from lla.training.settings import Training, override


def config(**sections):
    """The defaults of a task as plain dicts, with `sections` on top."""
    return override(training.defaults("mqar"), sections)


@pytest.mark.parametrize("task", tasks.names())
def test_defaults_resolve_with_every_key(task):
    settings = training.resolve(to_config(training.defaults(task)).to_dict())
    assert settings == training.resolve(
        {"task": {"name": task}, "model": {"mixer": {"name": "lla"}}}
    )
    assert settings.create_task() == tasks.create(task)
    assert settings.model.mixer.options == mixers.options("lla")


def test_the_task_says_where_outputs_are_read():
    base = {"task": {"name": "mad"}, "model": {"mixer": {"name": "lla"}}}
    for kind, readout in (("memorization", "each"), ("compression", "last")):
        settings = training.resolve(override(base | {"task": {"name": "mad", "kind": kind}}, {}))
        assert settings.model_config(settings.create_task()).readout == readout
    settings = training.resolve(base | {"task": {"name": "mqar"}})
    assert settings.model_config(settings.create_task()).readout == "each"


def test_one_name_swaps_the_mechanism_and_only_its_options_are_recorded():
    table = {"mixers": {"gla": {"chunk": 16}, "lla": {"ridge": 0.5}}}
    gla = training.resolve(config(model={"mixer": {"name": "gla"}}, **table))
    lla = training.resolve(config(model={"mixer": {"name": "lla"}}, **table))
    assert gla.model.mixer.options["chunk"] == 16 and lla.model.mixer.options["ridge"] == 0.5
    record = gla.record()
    assert record["model"]["mixer"] == {"name": "gla", **mixers.options("gla"), "chunk": 16}
    assert "mixers" not in record and "sweep" not in record
    assert record["task"] == {"name": "mqar", **tasks.options("mqar")}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimiser": {}}, r"config\.optimiser .*did you mean config\.optimizer\?"),
        ({"optimizer": {"learning_rat": 1.0}}, r"did you mean config\.optimizer\.learning_rate\?"),
        ({"training": {"step": 1}}, r"did you mean config\.training\.steps\?"),
        ({"sharding": {"fdsp": 1}}, r"did you mean config\.sharding\.fsdp\?"),
        ({"task": {"name": "mqar", "lenght": 64}}, r"did you mean config\.task\.length\?"),
        ({"mixers": {"gla": {"chnk": 1}}}, None),  # of another mechanism: not read
        ({"mixers": {"lla": {"rigde": 1}}}, r"did you mean config\.mixers\.lla\.ridge\?"),
        ({"mixers": {"lal": {}}}, r"did you mean config\.mixers\.lla\?"),
        ({"model": {"mixer": {"name": "llla"}}}, "did you mean 'lla'"),
        ({"model": {"mixer": {"name": "lla"}, "widht": 3}}, r"did you mean config\.model\.width\?"),
        ({"model": {"mixer": {"name": "lla", "ridge": 1}}}, r"config\.model\.mixer\.ridge"),
        ({"model": {}}, r"config\.model\.mixer lacks a name"),
        ({"task": {}}, r"config\.task lacks a name"),
        ({"task": {"name": "mqr"}}, "did you mean 'mqar'"),
        ({"task": {"name": "mqar", "length": 7}}, "length must be even"),
        ({"optimizer": {"name": "adamv"}}, "did you mean 'adamw'"),
        ({"optimizer": {"learning_rate": 0.0}}, "learning_rate must be > 0"),
        ({"optimizer": {"b1": 1.5}}, "b1 must be >= 0.0 and <= 1.0"),
        ({"training": {"batch_size": 0}}, "batch_size must be >= 1"),
        ({"training": {"eval_every": 15}}, "eval_every must be a multiple of training.log_every"),
        ({"sharding": {"data": 0}}, "sharding.data must be >= 1 or -1"),
        ({"sharding": {"fsdp": -1}}, "only one of"),
    ],
)
def test_mistakes_name_what_is_wrong(changes, message):
    base = {"task": {"name": "mqar"}, "model": {"mixer": {"name": "lla"}}}
    if message is None:
        training.resolve(base | changes)
        return
    with pytest.raises(ValueError, match=message):
        training.resolve(base | changes)


def test_overrides_reach_what_exists_alone():
    assert config(task={"length": 32})["task"]["length"] == 32
    with pytest.raises(ValueError, match=r"did you mean config\.task\.length\?"):
        config(task={"lengt": 32})
    with pytest.raises(ValueError, match=r"config\.task is a section"):
        config(task=3)
    with pytest.raises(ValueError, match=r"config\.training\.steps is no section"):
        config(training={"steps": {"a": 1}})


def test_a_grid_becomes_points():
    given = config(
        sweep={"seeds": (0, 1), "learning_rates": (1e-3,)},
    )
    given["sweep"]["grid"] = {
        "model": {"mixer": {"name": ("softmax", "lla")}},
        "mixers": {"lla": {"ridge": (0.1, 1.0)}},
    }
    given["sweep"]["cases"] = {
        "short": {"task": {"length": 16}, "training": {"batch_size": 8}},
        "long": {"task": {"length": 32}},
    }
    runs, points = sweep.cells(given)
    assert runs.seeds == (0, 1)
    # Softmax has no ridge: one point a case, not two.
    assert [point.name for point in points] == [
        "case=short,model.mixer.name=softmax",
        "case=short,model.mixer.name=lla,mixers.lla.ridge=0.1",
        "case=short,model.mixer.name=lla,mixers.lla.ridge=1.0",
        "case=long,model.mixer.name=softmax",
        "case=long,model.mixer.name=lla,mixers.lla.ridge=0.1",
        "case=long,model.mixer.name=lla,mixers.lla.ridge=1.0",
    ]
    assert points[1].settings.task.options["length"] == 16
    assert points[1].settings.training.batch_size == 8
    assert points[4].settings.training.batch_size == Training().batch_size
    assert points[1].settings.model.mixer.options["ridge"] == 0.1


@pytest.mark.parametrize(
    "section, message",
    [
        ({"seed": (0,)}, r"did you mean config\.sweep\.seeds\?"),
        ({"seeds": ()}, "seeds must be different values"),
        ({"learning_rates": (1e-3, 1e-3)}, "learning_rates must be different"),
        ({"learning_rates": (-1.0,)}, "learning_rates must be > 0"),
        ({"grid": {"task": {"length": 16}}}, r"grid\.task\.length must be a tuple"),
        ({"grid": {"task": {"lenght": (16,)}}}, r"did you mean config\.task\.length\?"),
        ({"cases": {"a": {"tsk": {}}}}, r"did you mean config\.task\?"),
        ({"grid": {"task": {"length": (16, 7)}}}, "length must be even"),
        ({"grid": {"model": {"num_heads": (3,)}}}, "multiple of num_heads"),
    ],
)
def test_an_impossible_sweep_is_refused_before_it_starts(section, message):
    given = training.defaults("mqar")
    given["sweep"] = section
    with pytest.raises(ValueError, match=message):
        sweep.cells(given)


def test_a_sweep_is_not_sharded():
    with pytest.raises(ValueError, match="one device"):
        sweep.cells(config(sharding={"fsdp": 2}))


def test_a_program_needs_a_batch_that_its_devices_can_split():
    settings = training.resolve(config())
    odd = dataclasses.replace(settings.training, batch_size=12)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 8 devices"):
        training.Program(dataclasses.replace(settings, training=odd))
