"""The few kernels that own their speed, each tested against a plain reference."""
