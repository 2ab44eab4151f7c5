"""Cost, break-even and fleet plans: the arithmetic of decisions."""
