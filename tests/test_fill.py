"""A field left to fill: the largest legal value whose predicted bytes fit with the asked probability."""

from typing import Any

import pytest

from orchestrator.caps import Caps
from orchestrator.feasibility import Predictor
from orchestrator.fill import NothingFits, fill_to
from orchestrator.points import Domain
from orchestrator.space import FillRange, Parameter
from worker.recipes import load_recipe
from worker.spec import GangConfig, InvalidSpec, TrialSpec, override, parse_spec

WIDTHS = tuple(range(32, 513, 4))


def at_width(width: Any) -> TrialSpec | None:
    """The laptop recipe at a width; with 3 heads, only multiples of 6 are legal."""
    try:
        return parse_spec(override(load_recipe("laptop"), {"model.width": width}))
    except InvalidSpec:
        return None


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("cap_bytes", [150_000, 400_000, 1_000_000])
def test_the_filled_value_is_the_largest_legal_one_that_fits(cap_bytes: int, probability: float) -> None:
    predictor = Predictor()
    found = fill_to(predictor, Caps(cap_bytes=cap_bytes), probability)(at_width, WIDTHS)
    fitting = [
        width for width in WIDTHS
        if (spec := at_width(width)) is not None and predictor.quantile(spec, probability) <= cap_bytes
    ]  # fmt: skip
    assert found == max(fitting)


def test_the_surer_it_shall_be_the_smaller_the_value() -> None:
    caps = Caps(cap_bytes=1_000_000)
    found = [fill_to(Predictor(), caps, probability)(at_width, WIDTHS) for probability in (0.05, 0.5, 0.95)]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 3


def test_quantiles_rise_with_probability_and_meet_the_prediction() -> None:
    predictor, spec = Predictor(), at_width(96)
    assert spec is not None
    quantiles = [predictor.quantile(spec, probability) for probability in (0.01, 0.05, 0.5, 0.95, 0.99)]
    said = predictor.predict(spec)
    assert quantiles == sorted(quantiles)
    assert quantiles[1:4] == [said.artifact_bytes_low, said.artifact_bytes, said.artifact_bytes_high]


@pytest.mark.parametrize(("values", "cap_bytes"), [(WIDTHS, 60_000), ((35, 37), 10**9), ((), 10**9)])
def test_where_no_value_is_legal_and_fits_nothing_is_filled(values: tuple[int, ...], cap_bytes: int) -> None:
    with pytest.raises(NothingFits):
        fill_to(Predictor(), Caps(cap_bytes=cap_bytes), 0.5)(at_width, values)


def test_a_point_of_a_space_is_filled_to_the_cap() -> None:
    base = {**load_recipe("laptop"), "model": {**load_recipe("laptop")["model"], "heads": 4, "kv_heads": 2}}
    space = {
        "sharing.lora.rank": Parameter(choice=(0, 16)),
        "model.width": Parameter(fill=FillRange(probability=0.9, low=32, high=512, step=8)),
    }
    domain, predictor = Domain(base, space), Predictor()
    fill = fill_to(predictor, Caps(cap_bytes=400_000), 0.9)
    plain, adapted = (domain.spec({"sharing.lora.rank": rank}, GangConfig(), fill) for rank in (0, 16))
    assert plain.model.width > adapted.model.width
    for spec in (plain, adapted):
        wider = override(spec.model_dump(mode="json"), {"model.width": spec.model.width + 8})
        assert predictor.quantile(spec, 0.9) <= 400_000 < predictor.quantile(parse_spec(wider), 0.9)
    with pytest.raises(NothingFits):
        domain.spec({"sharing.lora.rank": 16}, GangConfig(), fill_to(predictor, Caps(cap_bytes=60_000), 0.9))
