"""How a probe is fitted and judged: tasks, splits, controls, scores, one cell at a time. Private."""
