"""What every part may use: models, devices, progress, signals."""
