"""Which units leave first."""
