"""A training made cheaper: how large a share of the whole one it is, with its whole schedule inside that share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.spec import BudgetConfig, GangConfig, Problem, TrialSpec, parse_spec


@dataclass(frozen=True)
class Rung:
    """What a run at a rung trains with. Rung 0 is the spec's own budget; -1 the dearest of the cheaper ones."""

    number: int
    budget: BudgetConfig
    gang: GangConfig


def share_of(budget: BudgetConfig, ranks: int, whole: BudgetConfig, whole_ranks: int) -> float | None:
    """The share of a whole training's work that a budget allows; None where the two limit different things.

    Of seconds, ranks do a share of the work each; steps and tokens are the same work on any number of ranks.
    """
    shares: list[float] = []
    for name in BudgetConfig.model_fields:
        some, most = getattr(budget, name), getattr(whole, name)
        if (some is None) != (most is None):
            return None
        if some is not None:
            shares.append(some / most * (ranks / whole_ranks if name == "seconds" else 1.0))
    return min(shares)


def rung_problems(
    base: Mapping[str, Any],
    paths: Iterable[str],
    shapes: Sequence[GangConfig],
    rungs: Sequence[tuple[BudgetConfig, int | None]],
) -> Iterator[Problem]:
    """What is wrong with a study's rungs, cheapest first, each a budget and ranks, for gangs of these shapes: each must
    be a cheaper training than the next, and all of the base's own. `paths` are those that vary."""
    whole = parse_spec(base).budget
    if rungs:
        for path in (path for path in paths if path.split(".")[0] == "budget"):
            message = "cannot vary in a study with promotion, whose rungs are shares of base.budget"
            yield Problem(f"space.{path}", path, message)
    for index, (budget, ranks) in enumerate(rungs):
        before, wide = rungs[index - 1] if index else (None, None)
        for gang in shapes:
            share = share_of(budget, min(ranks or gang.ranks, gang.ranks), whole, gang.ranks)
            least = share_of(before, min(wide or gang.ranks, gang.ranks), whole, gang.ranks) if before else 0.0
            if share is None or not (least or 0.0) < share < 1:
                limits = " and ".join(whole.model_dump(exclude_none=True))
                message = f"must limit {limits}, as base.budget does, to less, and to more than the rung before"
                yield Problem(f"promotion.rungs.{index}.budget", budget.model_dump(exclude_none=True), message)
                break


def shortened(spec: TrialSpec, rung: Rung) -> TrialSpec:
    """The spec at this rung, with all that it counts in steps scaled alike: a complete training.

    What it says in shares of the budget stays.
    """
    if rung.number == 0:
        return spec.model_copy(update={"budget": rung.budget, "gang": rung.gang})
    share = share_of(rung.budget, rung.gang.ranks, spec.budget, spec.gang.ranks)
    assert share is not None, "studies check their rungs"

    def steps(count: int) -> int:
        return max(1, round(count * share)) if count else 0

    schedule, optimizer, averaging, objective = spec.schedule, spec.optimizer, spec.averaging, spec.objective
    if schedule.warmdown_steps is not None:
        schedule = schedule.model_copy(update={"warmdown_steps": steps(schedule.warmdown_steps)})
    return spec.model_copy(
        update={
            "budget": rung.budget,
            "gang": rung.gang,
            "schedule": schedule,
            "optimizer": optimizer.model_copy(
                update={"muon_momentum_warmup_steps": steps(optimizer.muon_momentum_warmup_steps)}
            ),
            "averaging": averaging.model_copy(
                update={"swa_every": steps(averaging.swa_every), "ema_decay": averaging.ema_decay ** (1 / share)}
            ),
            "objective": objective.model_copy(update={"nuclear_norm_every": steps(objective.nuclear_norm_every)}),
        }
    )


def eased(spec: TrialSpec, times: int) -> TrialSpec:
    """The spec with its micro-batch halved so many times. A step's batch is the same, summed in smaller parts."""
    data = spec.data
    held = min(data.micro_batch_sequences, data.batch_sequences // spec.gang.ranks)
    smaller = data.model_copy(update={"micro_batch_sequences": max(1, held // 2**times)})
    return spec.model_copy(update={"data": smaller})
