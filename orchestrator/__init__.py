"""Studies, trials, runs and attempts: what to train next, where it runs, and what came of it."""
