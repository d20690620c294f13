"""How far training has come, and what follows from it: learning-rate multiplier and Muon's momentum. Pure functions."""

from dataclasses import dataclass

from worker.spec import BudgetConfig, OptimizerConfig, TrialSpec


@dataclass(frozen=True)
class Progress:
    """Steps done, and the training seconds and tokens that they took."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def fraction(self, budget: BudgetConfig) -> float:
        """The share of the budget that is spent, by whichever limit is nearest. From 1 on, training is over."""
        limits = ((self.steps, budget.steps), (self.seconds, budget.seconds), (self.tokens, budget.tokens))
        return max(spent / limit for spent, limit in limits if limit is not None)


def learning_rate_multiplier(spec: TrialSpec, progress: Progress) -> float:
    """What multiplies every learning rate in the step after `progress`: 1, then down, never below min_multiplier."""
    schedule = spec.schedule
    if schedule.warmdown_steps is not None:
        left, length = _steps_left(spec, progress), float(schedule.warmdown_steps)
    else:
        assert schedule.warmdown_fraction is not None
        left, length = 1 - progress.fraction(spec.budget), schedule.warmdown_fraction
    if left >= length:
        return 1.0
    return max(left / length, schedule.min_multiplier, 0.0)


def muon_momentum(config: OptimizerConfig, step: int) -> float:
    """Muon's momentum in step `step` (from 0): linear from its start value over the warm-up, then its full value."""
    if step >= config.muon_momentum_warmup_steps:
        return config.muon_momentum
    warmed = step / config.muon_momentum_warmup_steps
    return (1 - warmed) * config.muon_momentum_start + warmed * config.muon_momentum


def _steps_left(spec: TrialSpec, progress: Progress) -> float:
    """Steps until the first limit of the budget; seconds converted at the mean step so far (the baseline's rule)."""
    budget, left = spec.budget, [float("inf")]
    if budget.steps is not None:
        left.append(budget.steps - progress.steps)
    if budget.tokens is not None:
        left.append((budget.tokens - progress.tokens) / spec.data.batch_tokens)
    if budget.seconds is not None and progress.seconds:
        left.append((budget.seconds - progress.seconds) * progress.steps / progress.seconds)
    return min(left)
