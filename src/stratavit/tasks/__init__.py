"""Tasks on the training engine: a super-network by PIAD, or one small model; and the demo, every step in one."""
