"""The paper's experiments, one file each: its claim, our measurement, and whether they agree."""
