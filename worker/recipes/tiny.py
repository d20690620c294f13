"""How a recipe becomes small enough for one CPU core: one rule for all of them."""

from typing import Any

from worker.spec import TrialSpec, override, parse_spec

HEADS = 4
HEAD_WIDTH = 16
SEQUENCE_LENGTH = 128
STEPS = 80


def tiny(data: dict[str, Any]) -> dict[str, Any]:
    """The recipe with its layers, blocks, tying and components, narrow, and trained in some seconds on one CPU core.

    Widths, lengths and the budget shrink by a rule; fractions of the budget stay. Learning rates, momentum and averages
    are those that suit so few steps. A recipe for a CPU stays as it is.
    """
    spec = parse_spec(data)
    if spec.gang.device == "cpu":
        return data
    return override(data, {**_shape(spec), **_training(spec), **_scoring(spec)})


def _shape(spec: TrialSpec) -> dict[str, Any]:
    """At most four heads of 16 values, in the recipe's ratio of key heads; ranks and tables in proportion."""
    model = spec.model
    heads = min(model.heads, HEADS)
    width = heads * HEAD_WIDTH
    changes: dict[str, Any] = {
        "model.vocab_size": 1024,
        "model.width": width,
        "model.heads": heads,
        "model.kv_heads": max(1, model.kv_heads * heads // model.heads),
        "model.query_rank": model.query_rank * width // model.width,
        "model.embedding_init_std": 0.02,
        "model.bigram_buckets": min(model.bigram_buckets, 512),
        "model.bigram_width": 32,
        "model.value_embedding_width": min(model.value_embedding_width, 16),
    }
    if model.rope_width is not None:
        changes["model.rope_width"] = min(model.rope_width, HEAD_WIDTH // 2)
    if model.rope_train_length is not None:
        changes["model.rope_train_length"] = _shortened(model.rope_train_length, spec)
    return changes


def _training(spec: TrialSpec) -> dict[str, Any]:
    optimizer, schedule, averaging = spec.optimizer, spec.schedule, spec.averaging
    changes: dict[str, Any] = {
        "data": {
            "dataset": "stdlib_sp1024",
            "sequence_length": SEQUENCE_LENGTH,
            "batch_tokens": 12 * SEQUENCE_LENGTH,
            "micro_batch_sequences": 12,
        },
        "budget": {"steps": STEPS},
        "gang": {"ranks": 1, "device": "cpu"},
        "limits.slow_percent": None,
        "schedule": {
            "warmdown_fraction": schedule.warmdown_fraction or 0.6,
            "min_multiplier": schedule.min_multiplier,
        },
        "optimizer.embedding_lr": min(optimizer.embedding_lr, 0.03),
        "optimizer.scalar_lr": min(optimizer.scalar_lr, 0.01),
        "optimizer.table_lr": 0.02,
        "optimizer.muon_momentum": 0.9,
        "optimizer.muon_momentum_start": 0.85,
        "optimizer.muon_momentum_warmup_steps": STEPS // 3,
    }
    if averaging.ema_decay:
        changes["averaging.ema_decay"] = 0.9
    if averaging.swa_every:
        changes["averaging.swa_every"] = 2
    return changes


def _scoring(spec: TrialSpec) -> dict[str, Any]:
    evaluation = spec.evaluation
    changes: dict[str, Any] = {
        "quantisation.half_below": 2048,
        "quantisation.calibration_tokens": 8192,
        "evaluation.validations": 4,
        "evaluation.validation_tokens": 8192,
        "evaluation.batch_sequences": 32,
    }
    if evaluation.sequence_length is not None:
        changes["evaluation.sequence_length"] = _shortened(evaluation.sequence_length, spec)
    if evaluation.stride is not None:
        changes["evaluation.stride"] = _shortened(spec.evaluated_length, spec) // 2
    return changes


def _shortened(length: int, spec: TrialSpec) -> int:
    """A length in tokens, in proportion to the recipe's windows."""
    return length * SEQUENCE_LENGTH // spec.data.sequence_length
