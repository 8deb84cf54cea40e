"""One pass over calibration images, and what it changes in the weights."""
