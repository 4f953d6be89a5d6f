"""Settings: what is refused, what the presets are, and that a resolved setting says all that a score depends on."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from cdclean.config import DistillConfig, ModelSpec, Preset, ScanConfig, fingerprint, paper, preset, to_dict
from cdclean.errors import UsageError


@pytest.mark.parametrize(
    "given",
    [
        {"objective": "loss"},
        {"steps": 0},
        {"learning_rate": -1.0},
        {"temperature": 0.0},
        {"grid": 0},
        {"averaged": 1.5},
        {"averaged": -0.1},
        {"colours": "red"},
        {"batch_size": 0},
        {"area_cost": -1.0},
        {"smoothness": -1.0},
        {"betas": (0.1, 1.0)},
    ],
)
def test_settings_out_of_range_are_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(given))):
        DistillConfig(**given)


@pytest.mark.parametrize("rate", [-1.0, -0.01, 1.01, 5.0, float("nan")])
def test_an_error_rate_is_a_share(rate: float) -> None:
    with pytest.raises(UsageError, match="max_error_rate"):
        ScanConfig("data", ModelSpec("probe.pt"), DistillConfig(), max_error_rate=rate)


@pytest.mark.parametrize("objective", ["logits", "features"])
def test_the_published_settings_are_the_papers(objective: Any) -> None:
    settings = preset("paper", objective=objective)
    assert settings == paper(objective)
    assert (settings.steps, settings.betas, settings.smoothness) == (100, (0.1, 0.1), 10.0)
    assert (settings.pixel_cost, settings.learning_rate) == ((0.01, 0.1) if objective == "logits" else (0.001, 0.05))
    assert (settings.grid, settings.averaged, settings.relative, settings.area_cost) == (None, 0.0, False, 0.0)
    assert settings.colours == "random"


def test_the_paper_has_no_objective_of_ours() -> None:
    with pytest.raises(UsageError, match="probabilities"):
        preset("paper", objective="probabilities")


def test_what_is_given_stands_above_the_preset() -> None:
    assert preset("default") == DistillConfig()
    assert preset("fast").steps < DistillConfig().steps < preset("thorough").steps
    assert preset("fast", steps=7).steps == 7
    assert preset("thorough", objective="logits").area_cost == DistillConfig(objective="logits").area_cost
    assert preset("paper", steps=3).pixel_cost == 0.01


def test_every_preset_is_another_run() -> None:
    prints = {fingerprint(to_dict(preset(name))) for name in get_args(Preset)}
    assert len(prints) == len(get_args(Preset))
