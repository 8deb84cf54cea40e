"""What is trained: a super-network by PIAD, or one small model."""
