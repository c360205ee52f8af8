"""Commands that measure, side by side in one run. Ratios count, not seconds: machines differ."""
