"""Two views of a training row: a weak change that a label surely survives, and a strong one."""
