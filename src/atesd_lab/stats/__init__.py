"""Is a difference distinguishable? Intervals, paired differences, the best of several arms."""
