"""Level 0: errors, checks, device facts and the choice of a backend. Knows no op and no model."""
