"""Ground floor: opens, runs, measures and serves converted models. Needs numpy only; never torch."""
