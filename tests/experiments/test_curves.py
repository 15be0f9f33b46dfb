"""Learning curves of runs and sweeps: what is read, which labels there are, what is drawn."""

import json
import pathlib

import matplotlib.image
import numpy as np
import pytest

from lla import training
from lla.experiments import figure
from lla.runs import WorkdirError, curves


def make(path: pathlib.Path, mixer: str, records, result=None, **changes) -> pathlib.Path:
    """A work directory of training."""
    config = training.defaults("mqar")
    config["model"]["mixer"]["name"] = mixer
    for key, value in changes.pop("model", {}).items():
        config["model"][key] = value
    path.mkdir(parents=True)
    record = training.resolve(config).record() | changes
    (path / "config.json").write_text(json.dumps(record))
    lines = [json.dumps(entry) + "\n" for entry in records]
    (path / "metrics.jsonl").write_text("".join(lines))
    if result is not None:
        (path / "result.json").write_text(json.dumps(result))
    return path


def evaluations(values, name="validation/accuracy", every=10):
    return [
        {"kind": "eval", "step": every * number, name: value, "validation/loss": 1.0}
        for number, value in enumerate(values)
    ]


def make_sweep(path: pathlib.Path) -> pathlib.Path:
    """Two widths by two mechanisms, two seeds [rows] and two learning rates [columns]."""
    for mixer in ("lla", "softmax"):
        for width in (8, 16):
            best = width / 100 + (0.5 if mixer == "lla" else 0.0)
            make(
                path / "cells" / f"{mixer}_{width}" / "final",
                mixer,
                evaluations([[[0.0, 0.1], [0.0, 0.3]], [[None, best], [0.0, best + 0.2]]]),
                model={"width": width},
                choices={"model.mixer.name": mixer, "model.width": width},
                runs={"seeds": [0, 1], "learning_rates": [1.0, 0.1]},
            )
    return path


def test_runs_are_read_and_labelled(tmp_path):
    first = make(tmp_path / "a", "lla", evaluations([0.0, 0.5, 1.0]))
    second = make(tmp_path / "b", "gla", evaluations([0.0, None]), model={"width": 16})
    metric, found = curves.read([first, second])
    assert metric == "validation/accuracy"
    assert [(curve.panel, curve.label) for curve in found] == [("", "LLA"), ("", "GLA")]
    assert found[0].steps.tolist() == [0, 10, 20] and found[0].mean.tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_array_equal(found[1].mean, [0.0, np.nan])
    third = make(tmp_path / "c", "lla", evaluations([0.0]), model={"width": 64})
    _, found = curves.read([first, third])
    assert [curve.label for curve in found] == ["LLA, width=128", "LLA, width=64"]


def test_a_sweep_has_the_mean_over_seeds_at_its_best_rate(tmp_path):
    metric, found = curves.read([make_sweep(tmp_path / "sweep")])
    assert metric == "validation/accuracy"
    named = {(curve.panel, curve.label): curve for curve in found}
    panels, labels = ("width=8", "width=16"), ("LLA", "Softmax")
    assert set(named) == {(panel, label) for panel in panels for label in labels}
    curve = named["width=16", "LLA"]
    np.testing.assert_allclose(curve.values, [[0.1, 0.66], [0.3, 0.86]])
    np.testing.assert_allclose(curve.mean, [0.2, 0.76])
    # One point of it, and two sweeps beside each other.
    _, (alone,) = curves.read([tmp_path / "sweep" / "cells" / "lla_16" / "final"])
    assert (alone.panel, alone.label) == ("", "LLA")
    _, both = curves.read([tmp_path / "sweep", make_sweep(tmp_path / "other")])
    assert {curve.label for curve in both} == {
        f"{mixer}, {folder}" for mixer in labels for folder in ("sweep", "other")
    }


def test_a_selection_counts_until_the_results_begin(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    (sweep / "cells" / "lla_8" / "final").rename(sweep / "cells" / "lla_8" / "select")
    assert len(curves.read([sweep])[1]) == 4


def test_metrics_are_named_or_the_nearest_is(tmp_path):
    result = {"metric": "validation/loss", "mode": "min"}
    run = make(tmp_path / "run", "lla", evaluations([0.5, 0.5]), result)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 10, "loss": 2.0}) + "\n")
    assert curves.read([run])[0] == "validation/loss"
    assert curves.read([run], "accuracy")[0] == "validation/accuracy"
    metric, (curve,) = curves.read([run], "train/loss")
    assert metric == "train/loss" and curve.mean.tolist() == [2.0]
    with pytest.raises(ValueError, match="unknown metric: 'acuracy'; did you mean 'validation/acc"):
        curves.read([run], "acuracy")


def test_directories_without_curves_are_named(tmp_path):
    run = make(tmp_path / "run", "lla", [])
    with pytest.raises(WorkdirError, match="no records yet"):
        curves.read([run])
    with pytest.raises(WorkdirError, match=r"ruun is no work directory.* Did you mean .*run\?"):
        curves.read([tmp_path / "ruun"])
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "config.json").write_text('{"experiment": "bias_exponents"}')
    with pytest.raises(WorkdirError, match="nothing was trained there"):
        curves.read([tmp_path / "study"])


def test_the_plot_in_text(tmp_path):
    rising = make(tmp_path / "a", "lla", evaluations([0.0, 1.0]))
    falling = make(tmp_path / "b", "softmax", evaluations([1.0, 0.0, 0.0]))
    other = make(tmp_path / "c", "gla", [{"kind": "train", "step": 10, "loss": 1.0}])
    metric, found = curves.read([rising, falling, other])
    lines = list(curves.text(metric, found, width=24, height=5))
    assert lines == [
        "validation/accuracy",
        "1 |bb       aa",
        "  |  bb   aa",
        "  |    bbb",
        "  |  aa   bb",
        "0 |aa       bbbbbbbbbbbb",
        "  +---------------------",
        "   0          20 updates",
        "  a  LLA: 1 at 10",
        "  b  Softmax: 0 at 20",
        "  -  GLA: has no validation/accuracy",
        "",
    ]


def test_curves_that_are_flat_or_not_finite_have_a_plot(tmp_path):
    for name, values in (("flat", [0.5, 0.5]), ("nothing", [None, None])):
        run = make(tmp_path / name, "lla", evaluations(values))
        text = "\n".join(curves.text(*curves.read([run])))
        assert ("0.5 at 10" if name == "flat" else "not finite at 10") in text


def test_the_command_draws_a_picture(tmp_path, capsys, monkeypatch):
    sweep = make_sweep(tmp_path / "sweep")
    assert figure.main(["curves", str(sweep)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(sweep / "curves.png")
    assert "validation/accuracy, width=16" in out and "  a  LLA: 0.76 at 10, 2 seeds" in out
    picture = matplotlib.image.imread(sweep / "curves.png")[..., :3]
    for colour in ("#D55E00", "#0072B2"):  # of LLA and softmax attention
        rgb = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        assert (np.abs(picture - rgb).max(-1) < 0.02).sum() > 100
    monkeypatch.chdir(tmp_path)
    run = make(tmp_path / "run", "lla", evaluations([0.0, 1.0]))
    assert figure.main(["curves", "run", "sweep", "--output=new/both.png"]) == 0
    assert (tmp_path / "new" / "both.png").exists()
    assert figure.main(["curves", str(run), "--text"]) == 0
    assert not (run / "curves.png").exists()
    assert figure.main(["curves", str(run), "--output=curves.nothing"]) == 1
    assert capsys.readouterr().err.startswith("FATAL --output: ")


def test_the_command_names_the_nearest_figure(capsys):
    assert "mqar" in figure.names() and "trained" not in figure.names()
    assert figure.main(["mqr"]) == 1
    assert "did you mean 'mqar'?" in capsys.readouterr().err
    assert figure.main([]) == 0
    assert "lla-figure curves" in capsys.readouterr().out
