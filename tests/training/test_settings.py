"""From a config to settings, and what is refused on the way."""

import copy
import dataclasses
import functools
import math

import pytest

from lla import mixers, tasks, training
from lla.runs import to_config
from lla.training import sweep
from lla.training.settings import Training, override
from lla.training.unused import check_used


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
        (
            {"training": {"stop_at": "abc"}},
            r"training\.stop_at must be .* or None, got 'abc'",
        ),
        (
            {"training": {"stop_at": (1, 2)}},
            r"a finite number or None, got \(1, 2\)",
        ),
        ({"training": {"stop_at": math.nan}}, "stop_at must be a finite number or None, got nan"),
        (
            {"training": {"seed": 2**32}},
            "training.seed must be .* <= 4294967295, got 4294967296",
        ),
        ({"training": {"seed": 0.5}}, r"config\.training\.seed must be an integer, got 0\.5"),
        ({"training": {"steps": 2**31}}, "training.steps must be >= 1 and <= 2147483647"),
        (
            {"training": {"steps": "many"}},
            r"config\.training\.steps must be an .*, got 'many'",
        ),
        ({"training": {"steps": True}}, r"config\.training\.steps must be an integer, got True"),
        ({"training": 3}, r"config\.training is a section, got 3"),
        ({"optimizer": {"learning_rate": math.inf}}, "learning_rate must be a finite number"),
        ({"optimizer": {"name": None}}, r"config\.optimizer\.name must be a string, got None"),
        ({"sharding": {"data": "all"}}, r"config\.sharding\.data must be an integer, got 'all'"),
        ({"task": 3}, r"config\.task is a section, got 3"),
        (
            {"task": {"name": "mqar", "pairs": 1.5}},
            r"config\.task\.pairs must be an integer or",
        ),
        (
            {"task": {"name": "mqar", "pairs": (1, "a")}},
            r"task\.pairs must be .* \(1, 'a'\)",
        ),
        ({"task": {"name": "mqar", "length": None}}, r"config\.task\.length must be an integer"),
        ({"model": 3}, r"config\.model is a section, got 3"),
        ({"model": {"mixer": "lla"}}, r"config\.model\.mixer is a section, got 'lla'"),
        ({"model": {"mixer": {"name": 3}}}, r"config\.model\.mixer\.name must be a string, got 3"),
        (
            {"model": {"mixer": {"name": "lla"}, "width": "a"}},
            r"model\.width must be an integer",
        ),
        (
            {"model": {"mixer": {"name": "lla"}, "dtype": "float8_e4m3fn"}},
            "dtype must be one of float32, bfloat16, float16, float64, got 'float8_e4m3fn'",
        ),
        ({"model": {"mixer": {"name": "lla"}, "dtype": "float64"}}, "needs jax_enable_x64"),
        (
            {"model": {"mixer": {"name": "lla"}, "mlp_ratio": math.inf}},
            "mlp_ratio must be a",
        ),
        ({"mixers": {"lla": 3}}, r"config\.mixers\.lla is a section, got 3"),
        (
            {"mixers": {"lla": {"local_window_size": 3.5}}},
            r"config\.mixers\.lla\.local_window_size must be an integer, a tuple .* got 3\.5",
        ),
        ({"mixers": {"lla": {"solver_tol": "abc"}}}, r"solver_tol must be .* or None, got 'abc'"),
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


def test_values_become_what_their_options_are_declared_with():
    settings = training.resolve(
        config(
            model={"mlp_ratio": 4},
            optimizer={"clip_norm": 1},
            task={"pairs": [1, 2], "train_examples": None},
            mixers={"lla": {"scale": 1, "local_window_size": [3, 0]}},
        )
    )
    assert settings.task.options["pairs"] == (1, 2)
    assert settings.task.options["train_examples"] is None
    assert settings.model.mixer.options["local_window_size"] == (3, 0)
    for number in (
        settings.model.mlp_ratio,
        settings.optimizer.clip_norm,
        settings.model.mixer.options["scale"],
    ):
        assert isinstance(number, float)


@pytest.mark.parametrize("task", tasks.names())
@pytest.mark.parametrize("wrong", ["abc", (1.5, "a"), {"a": 1}], ids=repr)
def test_every_field_refuses_another_type_by_its_name(task, wrong):
    """Whatever fields there are: none accepts a value of a type that it is not declared with."""
    default = training.defaults(task)
    mixer = default["model"]["mixer"]["name"]
    for section in ("task", "model", "optimizer", "training", "sharding", f"mixers.{mixer}"):
        fields = default
        for key in section.split("."):
            fields = fields[key]
        for field, value in fields.items():
            if isinstance(value, (str, dict)) and isinstance(wrong, str):
                continue  # the right type, if not the right name
            if field in ("mixer", "implementation"):
                continue
            changed = sweep._nested(f"{section}.{field}", wrong)
            given = copy.deepcopy(default)
            inner = given
            for key in section.split("."):
                inner, changed = inner[key], changed[key]
            inner.update(changed)
            with pytest.raises(ValueError, match=rf"config\.{section}\.{field} must be "):
                training.resolve(given)


def test_the_command_line_is_told_what_nothing_reads():
    check = functools.partial(check_used, sweeps=False)
    check(["mixers.lla.ridge", "model.width", "training.seed"], ["lla"])
    with pytest.raises(ValueError, match=r"mixers\.lla\.ridge has no effect.*'lla'.*here is 'gla'"):
        check(["model.width", "mixers.lla.ridge"], ["gla"])
    with pytest.raises(ValueError, match=r"config\.sweep\.seeds has no effect on a single run"):
        check(["sweep.seeds"], ["lla"])
    check_used(["sweep.seeds", "mixers.gla.chunk"], ["lla", "gla"], sweeps=True)
    with pytest.raises(ValueError, match="the mixer trained here is 'lla' or 'gla'"):
        check_used(["mixers.linear.chunk"], ["lla", "gla"], sweeps=True)
    for path, other in (("training.seed", "seeds"), ("optimizer.learning_rate", "learning_rates")):
        with pytest.raises(ValueError, match=rf"{path} has no effect .*\.sweep\.{other}"):
            check_used([path], ["lla"], sweeps=True)


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
    runs, points = sweep.grid_points(given)
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
        ({"seeds": (-1,)}, "sweep.seeds must be >= 0 and <= 4294967295, got -1"),
        ({"selection_seeds": (-1,)}, "sweep.selection_seeds must be >= 0 and <= 4294967295"),
        ({"selection_seeds": (1.5,)}, r"sweep\.selection_seeds must be a tuple of integers"),
        ({"seeds": (2**32,)}, "sweep.seeds must be >= 0 and <= 4294967295"),
        ({"seeds": (1.5,)}, r"config\.sweep\.seeds must be a tuple of integers, got \(1\.5,\)"),
        ({"seeds": 3}, r"config\.sweep\.seeds must be a tuple of integers, got 3"),
        (
            {"learning_rates": ("a",)},
            r"sweep\.learning_rates must be a tuple of",
        ),
        ({"grid": 3}, r"config\.sweep\.grid must be a section"),
        (
            {"grid": {"mixers": {"gla": {"chunk": (8, 16)}}}},
            "mixers.gla.chunk has no effect",
        ),
        ({"cases": {"a": {"mixers": {"gla": {"chunk": 8}}}}}, "mixer trained here is 'lla'"),
        (
            {"grid": {"training": {"seed": (0, 1)}}},
            r"no effect on a sweep: .*\.sweep\.seeds",
        ),
        ({"grid": {"optimizer": {"learning_rate": (1.0,)}}}, r"set config\.sweep\.learning_rates"),
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
        sweep.grid_points(given)


def test_a_sweep_is_not_sharded():
    with pytest.raises(ValueError, match="one device"):
        sweep.grid_points(config(sharding={"fsdp": 2}))


def test_a_program_needs_a_batch_that_its_devices_can_split():
    settings = training.resolve(config())
    odd = dataclasses.replace(settings.training, batch_size=12)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 8 devices"):
        training.Trainer(dataclasses.replace(settings, training=odd))
