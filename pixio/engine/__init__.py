"""What every training program needs, whatever its model: ranks, steps, checkpoints, configuration, logs."""
