"""Real text that is already on the machine, and synthetic tasks; everything seeded."""
